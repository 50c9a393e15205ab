"""audit: planted wrong labels are found by out-of-fold scores alone; what cannot be audited is told in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from results import write_results
from scipy.special import expit

from malaria_ray import cli
from malaria_ray.errors import ConfigError, DatasetError
from malaria_ray.runtime import storage
from malaria_ray.schema import AUDIT_METRICS, LABEL_AUDIT
from malaria_ray.stages import audit, verify

N = 3000


def planted(fold: int, *, by: str = "patient", seed: int = 5) -> tuple[pd.DataFrame, np.ndarray]:
    """Cells of 30 patients of which 2 % have a wrong label, with the scores of the model of one of three folds.

    It is 97 to 98 % right on cells that it holds out and agrees with every label that it was trained on.
    """
    rng = np.random.default_rng([seed])
    patient, truth, is_wrong = rng.integers(30, size=N), rng.integers(0, 2, N), rng.random(N) < 0.02
    ease = rng.normal(4, 1.6, N) * (2 * truth - 1)
    label = np.where(is_wrong, 1 - truth, truth)
    is_test = (patient if by == "patient" else np.arange(N)) % 3 == fold
    own = np.random.default_rng([seed, fold]).normal(0, 1.2, N)
    score = np.where(is_test, expit(ease + own), np.where(label == 1, 0.99, 0.01)).astype(np.float32)
    frame = pd.DataFrame(
        {
            "image_id": [f"cell_{i:05d}.png" for i in range(N)],
            "patient_id": [f"P{p:02d}" for p in patient],
            "label": label,
            "score": score,
            "split": np.where(is_test, "test", "train"),
        }
    )
    return frame, is_wrong


def write_fold(folder: Path, fold: int, of: pd.DataFrame) -> str:
    name = f"fold-{fold}"
    return str(write_results(folder / name, of, archive=folder / "archive", model=name, has_images=False))


def audited(tmp_path: Path, *results: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    path = tmp_path / "audit"
    audit.run(audit.Config(results_and_audit=(*results, str(path))))
    return tuple(pq.read_table(path / table.name).to_pandas() for table in (LABEL_AUDIT, AUDIT_METRICS))


def test_two_percent_of_flipped_labels_are_found_over_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folds = [write_fold(tmp_path, fold, planted(fold)[0]) for fold in range(3)]
    assert cli.main(["audit", *folds, str(tmp_path / "audit")]) == 0
    found = pq.read_table(tmp_path / "audit" / "label_audit").to_pandas()
    _, is_wrong = planted(0)
    wrong = {f"cell_{i:05d}.png" for i in np.flatnonzero(is_wrong)}
    hits = found["image_id"].isin(wrong).sum()
    precision, recall = hits / len(found), hits / len(wrong)
    print(f"precision {precision:.3f}, recall {recall:.3f} of {len(wrong)} planted")
    assert precision > 0.75
    assert recall > 0.8
    assert set(found["n_models"]) == {1}  # the two that were trained on an image have no say
    metrics = pq.read_table(tmp_path / "audit" / "audit_metrics").to_pandas()
    mean = metrics[metrics["results"] == "mean"].set_index("metric").loc["accuracy"]
    assert (mean["n"], mean["n_without"]) == (N, N - len(found))
    assert mean["value_without"] > mean["value"]
    out = capsys.readouterr().out
    assert f"{len(found)} of 3,000 labels are likely wrong" in out
    assert "split by image" not in out
    verify.run(verify.Config(directory=str(tmp_path / "audit")))


def test_the_mean_score_is_called_at_the_runs_own_thresholds(tmp_path: Path):
    folds = [write_fold(tmp_path, fold, planted(fold)[0]) for fold in range(2)]
    for fold, threshold in zip(folds, (0.5, 0.7), strict=True):
        success = storage.locate(fold) / "_SUCCESS.json"
        storage.write_json(success, {**storage.read_json(success), "threshold": threshold})
    _, metrics = audited(tmp_path, *folds)
    by_results = metrics.groupby("results")["threshold"].first()
    assert by_results.to_dict() == pytest.approx({"fold-0": 0.5, "fold-1": 0.7, "mean": 0.6})


def test_one_fold_audits_what_it_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cells, _ = planted(1, by="image")
    found, metrics = audited(tmp_path, write_fold(tmp_path, 1, cells))
    held_out = cells[cells["split"] == "test"]
    assert set(found["image_id"]) <= set(held_out["image_id"])
    assert set(metrics["n"]) == {len(held_out)}
    assert "split by image" in capsys.readouterr().out


def test_a_second_run_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    results = write_fold(tmp_path, 0, planted(0)[0])
    first = audited(tmp_path, results)
    second = audited(tmp_path, results)
    assert "nothing to do" in caplog.text
    assert all(one.equals(other) for one, other in zip(first, second, strict=True))


CELLS = planted(0)[0]


@pytest.mark.parametrize(
    ("of", "said"),
    [
        pytest.param(CELLS.assign(split="train"), "not trained on it", id="all trained on"),
        pytest.param(CELLS.assign(label=pd.array([None] * N, "Int8")), "no labelled image", id="unlabelled"),
        pytest.param(CELLS[CELLS["label"] == 0], "none of the .* cells is parasitized", id="one class"),
        pytest.param(CELLS.assign(score=np.float32("nan")), "no numbers in 0..1, the first nan", id="NaN scores"),
    ],
)
def test_what_cannot_be_audited_is_told(of: pd.DataFrame, said: str, tmp_path: Path):
    with pytest.raises(DatasetError, match=said):
        audited(tmp_path, write_fold(tmp_path, 0, of))
    assert not (tmp_path / "audit" / "_SUCCESS.json").exists()


@pytest.mark.parametrize("of", [CELLS.assign(patient_id=None), CELLS.assign(patient_id="P1"), CELLS.iloc[:30]])
def test_few_cells_one_patient_or_none_are_audited(of: pd.DataFrame, tmp_path: Path):
    found, metrics = audited(tmp_path, write_fold(tmp_path, 0, of))
    assert len(found) <= len(of)
    assert metrics["value"].notna().any()


def test_scores_of_one_run_count_once(tmp_path: Path):
    first = write_fold(tmp_path, 0, CELLS)
    again = write_results(tmp_path / "again", CELLS, archive=tmp_path / "archive", model="fold-0", has_images=False)
    with pytest.raises(ConfigError, match="give the scores of a run once"):
        audited(tmp_path, first, str(again))


def test_copies_of_an_image_count_once_in_the_metrics(tmp_path: Path):
    once = CELLS.assign(content_digest=CELLS["image_id"])
    twice = pd.concat([once, once.assign(image_id="copy/" + once["image_id"])])
    (_, expected), (found, metrics) = (
        audited(tmp_path / name, write_fold(tmp_path / name, 0, of)) for name, of in (("once", once), ("twice", twice))
    )
    pd.testing.assert_frame_equal(metrics, expected)
    assert found["image_id"].str.startswith("copy/").any()


def test_one_directory_is_refused():
    with pytest.raises(ConfigError, match="then the directory to write"):
        audit.Config(results_and_audit=("results",))
