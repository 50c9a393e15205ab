from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from stages.conftest import Line

from malaria_ray.errors import ConfigError
from malaria_ray.stages import compare
from malaria_ray.stages.run_comparison import _test_metrics, open_runs, pooled


def test_runs_are_told_side_by_side_with_the_test_data_of_their_results(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture
):
    again = shutil.copytree(line.run, tmp_path / "again")
    figure = tmp_path / "comparison.png"
    urls = (str(line.run), str(again), str(line.results))
    compare.run(compare.Config(results=urls, figure=str(figure)))
    printed = capsys.readouterr().out
    assert "Validation, best epoch" in printed
    assert "Test split" in printed
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_runs_without_results_have_no_test_table(line: Line, tmp_path: Path, capsys: pytest.CaptureFixture):
    again = shutil.copytree(line.run, tmp_path / "again")
    compare.run(compare.Config(results=(str(line.run), str(again)), figure=str(tmp_path / "comparison.png")))
    assert "Test split" not in capsys.readouterr().out


def test_folds_of_one_cross_validation_are_pooled(line: Line, tmp_path: Path):
    for fold in (1, 2):
        config = shutil.copytree(line.run, tmp_path / f"fold-{fold}") / "config.json"
        content = json.loads(config.read_text())
        content["identity"]["fold"] = f"{fold} of 2"
        config.write_text(json.dumps(content))
    runs = open_runs([str(tmp_path / "fold-1"), str(tmp_path / "fold-2"), str(line.results)])
    (whole,) = pooled(runs)
    assert whole.name == "2 of 2 folds of cnn"
    assert whole.test is not None
    assert set(whole.test["image_id"]) == set(runs[0].test["image_id"]) | set(runs[1].test["image_id"])


def test_folds_with_thresholds_of_their_own_are_measured_by_their_calls():
    test = pd.DataFrame({"patient_id": ["P1", "P1", "P2", "P2"], "label": [0, 1, 0, 1], "score": [0.2, 0.3, 0.8, 0.9]})
    values, intervals = _test_metrics(test.assign(predicted_label=[0, 1, 0, 1]))
    assert (values["accuracy"], values["sensitivity"], values["roc_auc"]) == (1.0, 1.0, 0.75)
    assert intervals.keys() == values.keys()


def test_results_of_another_run_are_refused(line: Line, tmp_path: Path):
    other = shutil.copytree(line.run, tmp_path / "other")
    success = json.loads((other / "_SUCCESS.json").read_text()) | {"run_id": "cnn-other"}
    (other / "_SUCCESS.json").write_text(json.dumps(success))
    with pytest.raises(ConfigError, match="which is none of the runs given"):
        open_runs([str(other), str(line.results)])
