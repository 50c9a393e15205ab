from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from results import cells, write_results
from sklearn.metrics import accuracy_score, roc_auc_score

from malaria_ray import cli
from malaria_ray.errors import ConfigError, QueryError
from malaria_ray.stages import compare
from malaria_ray.stages.views import open_results


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two models' results on the same images."""
    folder = tmp_path_factory.mktemp("compare")
    first = write_results(folder / "first", cells(), archive=folder / "archive")
    second = write_results(folder / "second", cells(scores_seed=9), archive=folder / "archive", model="vgg19-frozen")
    return str(first), str(second)


def test_differences_are_of_the_second_against_the_first(two: tuple[str, str]):
    first, second = cells(), cells(scores_seed=9)
    both = pd.DataFrame(
        {
            "label": first["label"],
            "patient_id": first["patient_id"],
            "score": first["score"],
            "other_score": second["score"],
        }
    )
    table = compare.differences(both, *open_results(two), compare.Config(results=two, n_resamples=100))
    accuracies = [accuracy_score(one["label"], one["score"] >= 0.5) for one in (first, second)]
    assert table.loc["accuracy", ["first", "other"]].tolist() == pytest.approx(accuracies)
    assert table.loc["accuracy", "difference"] == pytest.approx(accuracies[1] - accuracies[0])
    aucs = [roc_auc_score(one["label"], one["score"]) for one in (first, second)]
    row = table.loc["roc_auc"]
    assert row["difference"] == pytest.approx(aucs[1] - aucs[0])
    assert row["ci_low"] < row["difference"] < row["ci_high"]


def test_only_held_out_cells_are_compared(two: tuple[str, str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(["compare", *two, "--n-resamples", "100"]) == 0
    out = capsys.readouterr().out
    n_test = int((cells()["split"] == "test").sum())
    assert f"{n_test} shared held-out cells" in out
    n_differ = int(((cells()["score"] >= 0.5) != (cells(scores_seed=9)["score"] >= 0.5)).sum())
    assert f"{n_differ} of 240 shared images are called differently" in out


def test_a_model_compared_with_itself_differs_in_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    twice = [
        str(write_results(tmp_path / name, cells(), archive=tmp_path / "archive", model=name)) for name in ("a", "b")
    ]
    assert cli.main(["compare", *twice, "--n-resamples", "100"]) == 0
    out = capsys.readouterr().out
    assert "0 of 240 shared images are called differently" in out
    assert "-0.0001" not in out


def test_unlabelled_results_are_compared_by_their_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    unlabelled = {"a": cells().assign(label=pd.NA), "b": cells(scores_seed=9).assign(label=pd.NA)}
    made = [str(write_results(tmp_path / name, of, archive=tmp_path / "archive")) for name, of in unlabelled.items()]
    assert cli.main(["compare", *made]) == 0
    assert "No shared image has a label" in capsys.readouterr().out


def test_results_that_share_nothing_are_refused(tmp_path: Path, two: tuple[str, str]):
    other = cells(20).assign(image_id=[f"other/{i}.png" for i in range(20)])
    results = write_results(tmp_path / "results", other)
    with pytest.raises(QueryError, match="share no image"):
        compare.run(compare.Config(results=(two[0], str(results))))
    with pytest.raises(ConfigError, match="give two or more"):
        compare.Config(results=two[:1])
