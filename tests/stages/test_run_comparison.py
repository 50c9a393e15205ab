from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stages.conftest import Line

from malaria_ray.errors import ConfigError, DatasetError
from malaria_ray.stages import compare, run_comparison
from malaria_ray.stages.run_comparison import _test_metrics, compare_runs, open_runs, pooled


def test_runs_are_told_side_by_side_with_the_test_data_of_their_results(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture
):
    again = shutil.copytree(line.run, tmp_path / "again")
    figure = tmp_path / "comparison.png"
    urls = (str(line.run), str(again), str(line.results))
    printed = []
    for seed in (42, 42, 43):
        compare.run(compare.Config(results=urls, figure=str(figure), n_resamples=100, seed=seed))
        printed.append(capsys.readouterr().out)
    assert "Validation, best epoch" in printed[0]
    assert "Test split" in printed[0]
    assert printed[0] == printed[1] != printed[2]
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_runs_without_results_have_no_test_table_and_without_figure_nothing_is_written(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    again = shutil.copytree(line.run, tmp_path / "again")
    compare.run(compare.Config(results=(str(line.run), str(again))))
    printed = capsys.readouterr().out
    assert "Test split" not in printed
    assert "--figure FILE.png writes their curves" in printed
    assert list(tmp_path.iterdir()) == [again]


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


def test_cross_validations_of_one_model_are_told_apart_by_what_differs(line: Line, monkeypatch: pytest.MonkeyPatch):
    test = pd.DataFrame(
        {
            "image_id": [f"cell_{i}.png" for i in range(4)],
            "patient_id": ["P1", "P1", "P2", "P2"],
            "label": [0, 1, 0, 1],
            "score": [0.2, 0.9, 0.3, 0.8],
            "predicted_label": [0, 1, 0, 1],
        }
    )
    (trained,) = open_runs([str(line.run)])
    runs = [
        replace(
            trained,
            name=f"{name}-{fold}",
            identity=trained.identity | changed | {"fold": f"{fold} of 5", "init_from": f"{name}-{fold}"},
            test=test,
        )
        for name, changed in {
            "plain": {"augment": False},
            "augmented": {"augment": True},
            "wide": {"augment": True, "batch_size": 32},
            "vgg19": {"model": "vgg19-frozen"},
        }.items()
        for fold in (1, 2)
    ]
    names = [
        "2 of 5 folds of cnn, augment False, batch_size 16",
        "2 of 5 folds of cnn, augment True, batch_size 16",
        "2 of 5 folds of cnn, augment True, batch_size 32",
        "2 of 5 folds of vgg19-frozen",
    ]
    assert [whole.name for whole in pooled(runs)] == names
    assert [whole.name for whole in pooled(runs[2:4])] == ["2 of 5 folds of cnn"]
    drawn = {}
    monkeypatch.setattr(run_comparison, "open_runs", lambda urls: runs)
    monkeypatch.setattr(run_comparison, "runs_figure", lambda histories, scores: drawn.update(scores) or b"")
    compare_runs([], n_resamples=100, seed=42)
    assert list(drawn) == [run.name for run in runs] + names


def test_folds_with_thresholds_of_their_own_are_measured_by_their_calls():
    test = pd.DataFrame({"patient_id": ["P1", "P1", "P2", "P2"], "label": [0, 1, 0, 1], "score": [0.2, 0.3, 0.8, 0.9]})
    values, intervals = _test_metrics(test.assign(predicted_label=[0, 1, 0, 1]), n_resamples=100, seed=42)
    assert (values["accuracy"], values["sensitivity"], values["roc_auc"]) == (1.0, 1.0, 0.75)
    assert intervals.keys() == values.keys()


def test_results_of_another_run_are_refused(line: Line, tmp_path: Path):
    other = shutil.copytree(line.run, tmp_path / "other")
    success = json.loads((other / "_SUCCESS.json").read_text()) | {"run_id": "cnn-other"}
    (other / "_SUCCESS.json").write_text(json.dumps(success))
    with pytest.raises(ConfigError, match="which is none of the runs given"):
        open_runs([str(other), str(line.results)])


def with_predictions(results: Path, target: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> str:
    """A copy of results whose predictions are others."""
    (part,) = Path(shutil.copytree(results, target), "predictions").iterdir()
    table = pq.read_table(part)
    pq.write_table(pa.Table.from_pandas(change(table.to_pandas()), schema=table.schema, preserve_index=False), part)
    return str(target)


def test_test_data_are_known_by_their_bytes_whatever_their_names(line: Line, tmp_path: Path):
    renamed = with_predictions(
        line.results, tmp_path / "renamed", lambda rows: rows.assign(image_id="copied/" + rows["image_id"])
    )
    (run,), (expected,) = (open_runs([str(line.run), url]) for url in (renamed, str(line.results)))
    assert len(expected.test) > 0
    assert run.test.drop(columns="image_id").equals(expected.test.drop(columns="image_id"))


def test_copies_of_a_cell_count_once(line: Line, tmp_path: Path):
    twice = with_predictions(
        line.results, tmp_path / "twice", lambda rows: pd.concat([rows, rows.assign(image_id="z/" + rows["image_id"])])
    )
    (run,), (expected,) = (open_runs([str(line.run), url]) for url in (twice, str(line.results)))
    assert run.test.equals(expected.test)


def test_results_without_test_data_are_refused_and_of_one_class_undefined(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture
):
    unlabelled = with_predictions(line.results, tmp_path / "unlabelled", lambda rows: rows.assign(label=None))
    with pytest.raises(DatasetError, match="unlabelled has no labelled cell of the test split"):
        compare.run(compare.Config(results=(str(line.run), unlabelled)))
    uninfected = with_predictions(line.results, tmp_path / "uninfected", lambda rows: rows[rows["label"] == 0])
    figure = str(tmp_path / "comparison.png")
    compare.run(compare.Config(results=(str(line.run), uninfected), figure=figure, n_resamples=100))
    assert "undefined" in capsys.readouterr().out


def test_what_is_given_twice_is_refused(line: Line, tmp_path: Path):
    again = str(shutil.copytree(line.results, tmp_path / "again"))
    with pytest.raises(ConfigError, match=r"again are results of one run, .*; give one of them"):
        open_runs([str(line.run), str(line.results), again])
    with pytest.raises(ConfigError, match="one directory is given twice"):
        open_runs([str(line.run), str(line.run)])


def test_flags_of_the_other_comparison_are_refused(line: Line, tmp_path: Path):
    page, figure = str(tmp_path / "page.html"), str(tmp_path / "figure.png")
    with pytest.raises(ConfigError, match=r"--report .*page.html: runs have no page"):
        compare.run(compare.Config(results=(str(line.run), str(line.results)), report=page))
    with pytest.raises(ConfigError, match=r"--figure .*figure.png: results have no such figure"):
        compare.run(compare.Config(results=(str(line.results), str(line.results)), figure=figure))
    with pytest.raises(ConfigError, match=r"--thumbnails 3 is of the page; give --report"):
        compare.Config(results=(str(line.run), str(line.results)), thumbnails=3)
    assert list(tmp_path.iterdir()) == []
