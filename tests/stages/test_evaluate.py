from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from results import cells as cells_of
from results import record, write_results
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, recall_score, roc_auc_score
from stages.conftest import Line, content

from malaria_ray.errors import DatasetError, DirectoryError, NotCompleteError
from malaria_ray.schema import DIFFERENCES, METRICS, PATIENTS, Call
from malaria_ray.stages import evaluate, report, screen, verify
from malaria_ray.stages.views import connect, open_results
from malaria_ray.statistics.validation import learn_from_validation


@pytest.fixture(scope="module")
def evaluated(line: Line) -> Path:
    evaluate.run(evaluate.Config(results=str(line.results), n_resamples=100))
    return line.results


def test_metrics_of_each_split_equal_scikit_learns(line: Line, evaluated: Path):
    metrics = pq.read_table(evaluated / "metrics").to_pandas()
    assert list(metrics.columns) == METRICS.names
    splits = pq.read_table(line.run / "splits.parquet").to_pandas().set_index("image_id")["split"]
    predictions = pq.read_table(evaluated / "predictions").to_pandas()
    for split, cells in predictions.groupby(predictions["image_id"].map(splits)):
        rows = metrics[(metrics["split"] == split) & (metrics["level"] == "cell")].set_index("metric")
        label, called = cells["label"], cells["predicted_label"]
        assert rows["value"]["accuracy"] == pytest.approx(accuracy_score(label, called))
        assert rows["value"]["sensitivity"] == pytest.approx(recall_score(label, called))
        assert rows["value"]["specificity"] == pytest.approx(recall_score(label, called, pos_label=0))
        assert rows["value"]["f1_weighted"] == pytest.approx(f1_score(label, called, average="weighted"))
        assert rows["value"]["roc_auc"] == pytest.approx(roc_auc_score(label, cells["score"]))
        counts = [
            rows["value"][f"n_{name}"]
            for name in ("true_negative", "false_positive", "false_negative", "true_positive")
        ]
        assert counts == confusion_matrix(label, called).ravel().tolist()
        assert set(rows["n"]) == {len(cells)}


def test_patients_are_counted(evaluated: Path):
    patients = pq.read_table(evaluated / "patients").to_pandas()
    predictions = pq.read_table(evaluated / "predictions").to_pandas()
    assert list(patients.columns) == PATIENTS.names
    by_patient = predictions.groupby("patient_id")
    assert patients["patient_id"].tolist() == sorted(by_patient.groups)
    assert patients["n_cells"].tolist() == by_patient.size().tolist()
    assert patients["n_parasitized"].tolist() == by_patient["predicted_label"].sum().tolist()
    assert patients["label"].tolist() == by_patient["label"].max().tolist()


def test_a_patients_label_is_that_of_all_its_cells_whatever_split_is_looked_at(tmp_path: Path):
    # P1, P3 … are infected; by image, many of them have no parasitized cell in the test split.
    of = cells_of(400, n_patients=40).assign(
        split=lambda cells: np.resize(["train", "val", "train", "test"], len(cells))
    )
    is_infected = of.groupby("patient_id")["label"].max()
    in_test = of[of["split"] == "test"]
    looks_uninfected = in_test.groupby("patient_id")["label"].max() == 0
    assert (looks_uninfected & (is_infected[looks_uninfected.index] == 1)).any()
    results = write_results(tmp_path / "results", of, has_images=False, has_validation=True)
    (part,) = (results / "predictions").iterdir()
    written = pq.read_table(part)
    for screened in ("all", "test"):
        is_screened = [screened == "all" or split == "test" for split in of["split"]]
        pq.write_table(written.filter(is_screened), part)
        record(results, f"predictions/{part.name}")
        (results / "metrics" / "_SUCCESS.json").unlink(missing_ok=True)
        evaluate.run(evaluate.Config(results=str(results), n_resamples=100))
        patients = pq.read_table(results / "patients").to_pandas()
        assert patients["label"].tolist() == is_infected[patients["patient_id"]].tolist()
        metrics = pq.read_table(results / "metrics").to_pandas().query("level == 'patient' and split == 'test'")
        value, n = (metrics.set_index("metric")[name] for name in ("value", "n"))
        fraction = in_test.assign(called=in_test["score"] >= 0.5).groupby("patient_id")["called"].mean()
        of_uninfected = fraction[is_infected[fraction.index] == 0]
        assert value["n_patients_uninfected"] == n["false_positive_rate_max"] == len(of_uninfected)
        assert value["n_patients_parasitized"] == len(fraction) - len(of_uninfected)
        assert value["false_positive_rate_max"] == pytest.approx(of_uninfected.max())
        assert value["roc_auc"] == pytest.approx(roc_auc_score(is_infected[fraction.index], fraction))
        called = patients[patients["split"] == "test"].set_index("patient_id")["call"] == Call.positive
        assert value["specificity"] == pytest.approx(1 - called[of_uninfected.index].mean())


KNOWN = cells_of(240).assign(split=lambda cells: cells["split"].mask(cells.index % 10 == 0))
"""Cells of 12 patients, of which a tenth are in no split of the run: new cells of patients that it may know."""


@pytest.mark.parametrize(
    ("of", "split_by", "said"),
    [
        pytest.param(
            KNOWN,
            "patient",
            "{} of {} held-out cells are of patients that the run was trained or tuned on:",
            id="new cells",
        ),
        pytest.param(
            KNOWN, "image", "trained or tuned on, as the run was split by image: their figures are", id="by image"
        ),
        pytest.param(cells_of(240), "patient", None, id="by patient"),
        pytest.param(KNOWN.assign(patient_id=None), "patient", None, id="no patients"),
        pytest.param(cells_of(240).assign(split=None), "image", None, id="new patients"),
    ],
)
def test_held_out_cells_of_patients_that_the_run_knows_are_told(
    of: pd.DataFrame, split_by: str, said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    results = write_results(tmp_path / "results", of, has_images=False, split_by=split_by)
    evaluate.run(evaluate.Config(results=str(results), n_resamples=100))
    report.run(report.Config(results=str(results)))
    told = capsys.readouterr().out, (results / "report" / "index.html").read_text(encoding="utf-8")
    is_held_out = ~of["split"].isin(["train", "val"])
    known = of.loc[of["split"].isin(["train", "val"]), "patient_id"]
    n_known = (is_held_out & of["patient_id"].isin(known)).sum()
    for text in told:
        assert (said or "").format(n_known, is_held_out.sum()) in text
        assert ("patients that the run was trained or tuned on" in text) == (said is not None)
    patients = pq.read_table(results / "patients").to_pandas().groupby("split")["n_cells"].sum()
    expected = of.assign(split=of["split"].fillna("unseen")).dropna(subset="patient_id").groupby("split").size()
    assert patients.to_dict() == expected.to_dict()


def two_models(folder: Path) -> tuple[Path, Path]:
    """Results of two models on the same 400 labelled cells of 40 patients; the second errs more."""
    good = cells_of(400, n_patients=40)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, len(good))
    poor = good.assign(score=(good["score"] + noise).clip(0, 1).astype("float32"))
    return write_results(folder / "good", good), write_results(folder / "poor", poor, archive=folder / "good-archive")


def test_two_models_are_compared_on_the_cells_that_both_held_out(tmp_path: Path):
    good, poor = two_models(tmp_path)
    evaluate.run(evaluate.Config(results=str(good), against=str(poor), n_resamples=100))
    table = pq.read_table(good / "differences").to_pandas().set_index("metric")
    assert list(pq.read_schema(good / "differences/part-00000.parquet").names) == DIFFERENCES.names
    held_out = {}
    for results in (good, poor):
        with connect(open_results([str(results)])) as views:
            cells = views.sql("SELECT * FROM cells WHERE split NOT IN ('train', 'val') AND label IS NOT NULL").df()
        held_out[results] = accuracy_score(cells["label"], cells["predicted_label"])
    assert table.loc["accuracy", "value"] == pytest.approx(held_out[good])
    assert table.loc["accuracy", "against_value"] == pytest.approx(held_out[poor])
    assert table.loc["accuracy", "difference"] == pytest.approx(held_out[good] - held_out[poor])
    assert 0 < table.loc["accuracy", "ci_low"] < table.loc["accuracy", "difference"] < table.loc["accuracy", "ci_high"]
    assert table["is_held_out"].all()
    verify.run(verify.Config(directory=str(good)))


def test_results_without_a_shared_label_are_not_compared(tmp_path: Path):
    good, poor = (
        write_results(tmp_path / name, cells_of(20, n_patients=4).assign(label=None), archive=tmp_path / "archive")
        for name in ("good", "poor")
    )
    with pytest.raises(DatasetError, match="share no labelled image"):
        evaluate.run(evaluate.Config(results=str(good), against=str(poor), n_resamples=100))


def test_results_to_compare_with_are_looked_for_before_anything_is_computed(tmp_path: Path):
    results = write_results(tmp_path / "results", cells_of(20, n_patients=4), has_images=False)
    with pytest.raises(NotCompleteError, match="elsewhere is not there"):
        evaluate.run(evaluate.Config(results=str(results), against=str(tmp_path / "elsewhere"), n_resamples=100))
    assert not (results / "metrics").exists()


def test_what_is_not_as_screening_wrote_it_is_not_evaluated(tmp_path: Path):
    results = write_results(tmp_path / "results", cells_of(240), has_images=False)
    part = results / "predictions" / "part-00000.parquet"
    written, table = part.read_bytes(), pq.read_table(part)
    pq.write_table(table.set_column(table.column_names.index("score"), "score", [[0.5] * 240]), part)
    with pytest.raises(DirectoryError, match=r"part-00000.parquet is not the file that was written \(its SHA-256"):
        evaluate.run(evaluate.Config(results=str(results), n_resamples=100))
    part.write_bytes(written)
    shutil.copy(part, results / "predictions" / "part-00001.parquet")
    evaluate.run(evaluate.Config(results=str(results), n_resamples=100))
    metrics = pq.read_table(results / "metrics").to_pandas()
    n_test = (cells_of(240)["split"] == "test").sum()
    assert set(metrics.query("split == 'test' and level == 'cell'")["n"]) == {n_test}, "no part that lies beside"
    (answer,) = connect(open_results([str(results)])).sql("SELECT count(*) FROM predictions").fetchall()
    assert answer == (240,)


def test_a_second_run_changes_nothing_and_says_so(evaluated: Path, caplog: pytest.LogCaptureFixture):
    before = content(evaluated)
    evaluate.run(evaluate.Config(results=str(evaluated), n_resamples=100))
    assert content(evaluated) == before
    assert "nothing to do" in caplog.text


def test_tables_of_another_version_of_the_code_are_computed_anew(evaluated: Path, monkeypatch: pytest.MonkeyPatch):
    marker = evaluated / "metrics/_SUCCESS.json"
    before = marker.read_text()
    monkeypatch.setattr(evaluate, "code_digest", lambda: "of a later version")
    evaluate.run(evaluate.Config(results=str(evaluated), n_resamples=100))
    assert "of a later version" in marker.read_text()
    monkeypatch.undo()
    evaluate.run(evaluate.Config(results=str(evaluated), n_resamples=100))
    assert marker.read_text() == before


def screened(line: Line, tmp_path: Path, rename) -> Path:
    with zipfile.ZipFile(line.archive) as original, zipfile.ZipFile(tmp_path / "some.zip", "w") as some:
        for name in original.namelist():
            if new := rename(name):
                some.writestr(new, original.read(name))
    screen.run(screen.Config(source=str(tmp_path / "some.zip"), results=str(tmp_path / "results"), model=str(line.run)))
    evaluate.run(evaluate.Config(results=str(tmp_path / "results"), n_resamples=100))
    return tmp_path / "results"


def test_images_are_recognised_by_content_under_another_name(line: Line, evaluated: Path, tmp_path: Path):
    renamed = screened(line, tmp_path, lambda name: f"copied/{name}")
    expected = pq.read_table(evaluated / "metrics").to_pandas()
    found = pq.read_table(renamed / "metrics").to_pandas()
    assert found.equals(expected)


def test_an_archive_without_labels_gets_patients_but_no_metrics(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    results = screened(line, tmp_path, lambda name: name.replace("Parasitized", "a").replace("Uninfected", "b"))
    assert pq.read_table(results / "metrics").num_rows == 0
    patients = pq.read_table(results / "patients").to_pandas()
    assert len(patients) == 24
    assert patients["label"].isna().all()
    assert "No image has a label" in capsys.readouterr().out


def test_one_class_gives_null_where_a_metric_is_undefined(line: Line, tmp_path: Path):
    results = screened(line, tmp_path, lambda name: name if "Uninfected" in name else None)
    metrics = pq.read_table(results / "metrics").to_pandas()
    rows = metrics[(metrics["level"] == "cell") & (metrics["split"] == "test")].set_index("metric")
    assert rows["value"][["sensitivity", "roc_auc", "f1"]].isna().all()
    assert 0 <= rows["value"]["specificity"] <= 1


ALL_CURVES = {"roc", "precision_recall", "calibration"}
CELLS = cells_of(2000, n_patients=40)
VALIDATION = learn_from_validation(CELLS.assign(split="val"))


@pytest.mark.parametrize(
    ("of", "n_patients", "curves"),
    [
        pytest.param(CELLS, 40, ALL_CURVES, id="all"),
        pytest.param(CELLS.iloc[:0], 0, set(), id="no prediction"),
        pytest.param(CELLS[CELLS["patient_id"] == "P1"], 1, ALL_CURVES, id="one patient"),
        pytest.param(CELLS.iloc[:10], 7, ALL_CURVES, id="ten cells"),
        pytest.param(CELLS.assign(label=pd.array([None] * 2000, "Int8")), 40, set(), id="unlabelled"),
        pytest.param(CELLS.assign(patient_id=None), 0, ALL_CURVES, id="no patients"),
        pytest.param(CELLS[CELLS["label"] == 0], 40, {"calibration"}, id="no positives"),
    ],
)
def test_what_can_be_said_is_said_and_the_rest_is_left_out(
    of: pd.DataFrame, n_patients: int, curves: set[str], tmp_path: Path
):
    results = write_results(tmp_path / "results", of, bad=("x.png",), has_images=False)
    (results / "model").mkdir(exist_ok=True)
    (results / "model" / "validation.json").write_text(json.dumps(VALIDATION.to_dict()))
    evaluate.run(evaluate.Config(results=str(results), n_resamples=100))
    patients = pq.read_table(results / "patients").to_pandas()
    assert len(patients) == n_patients
    assert patients["call"].isin([*Call]).all()
    assert patients["corrected_fraction"].between(0, 1).all()
    found = pq.read_table(results / "curves").to_pandas()
    assert set(found["curve"]) == curves
    metrics = pq.read_table(results / "metrics").to_pandas()
    assert metrics["split"].nunique() == (0 if of["label"].isna().all() else of["split"].nunique())
    if len(of):
        reviewed = pq.read_table(results / "review").to_pandas()
        assert sorted(reviewed["image_id"]) == sorted(of["image_id"])
        assert reviewed["rank"].dropna().tolist() == list(range(1, int(reviewed["needs_review"].sum()) + 1))


def test_copies_of_a_cell_are_one_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """An archive that holds every file twice knows no more of a patient than one that holds it once."""
    once = cells_of(480).assign(content_digest=lambda rows: rows["image_id"])
    twice = pd.concat([once, once.assign(image_id="copy/" + once["image_id"])])
    made = []
    for name, of in (("once", once), ("twice", twice)):
        results = write_results(tmp_path / name, of, has_images=False, has_validation=True)
        capsys.readouterr()
        evaluate.run(evaluate.Config(results=str(results), n_resamples=100))
        told = capsys.readouterr().out
        assert ("480 of 960 cells are copies of others, byte for byte" in told) == (name == "twice")
        made.append([pq.read_table(results / table).to_pandas() for table in ("patients", "curves", "metrics")])
    for ours, theirs in zip(*made, strict=True):
        pd.testing.assert_frame_equal(ours, theirs)
    evaluate.run(evaluate.Config(results=str(tmp_path / "twice"), against=str(tmp_path / "once"), n_resamples=100))
    differences = pq.read_table(tmp_path / "twice" / "differences").to_pandas()
    assert (differences["value"] == differences["against_value"]).all()


def test_rates_of_patients_say_of_how_many(tmp_path: Path):
    results = write_results(tmp_path / "results", cells_of(480), has_images=False, has_validation=True)
    evaluate.run(evaluate.Config(results=str(results), n_resamples=100))
    metrics = pq.read_table(results / "metrics").to_pandas()
    of_patients = metrics[(metrics["level"] == "patient") & (metrics["split"] == "test")].set_index("metric")
    for metric, label in (("sensitivity", "parasitized"), ("specificity", "uninfected")):
        assert of_patients["n"][metric] == of_patients["value"][f"n_patients_{label}"] > 0
    assert of_patients["n"]["roc_auc"] == of_patients["n"][["sensitivity", "specificity"]].sum()


@pytest.mark.parametrize("unlabelled", ["ours", "theirs"])
def test_results_are_compared_by_the_labels_that_either_gives(tmp_path: Path, unlabelled: str):
    good = cells_of(400, n_patients=40)
    of = {"ours": good, "theirs": good.assign(score=1 - good["score"])}
    of[unlabelled] = of[unlabelled].assign(label=None)
    ours, theirs = (
        str(write_results(tmp_path / name, of[name], has_images=False, archive=tmp_path / "archive")) for name in of
    )
    evaluate.run(evaluate.Config(results=ours, against=theirs, n_resamples=100))
    accuracy = pq.read_table(f"{ours}/differences").to_pandas().set_index("metric").loc["accuracy"]
    test = good[good["split"] == "test"]
    expected = accuracy_score(test["label"], test["score"] >= 0.5)
    assert accuracy["value"] == pytest.approx(expected)
    assert accuracy["against_value"] == pytest.approx(1 - expected)
    assert accuracy["n"] == len(test)


def test_results_of_other_labels_are_not_compared(tmp_path: Path):
    of = {"ours": cells_of(40), "theirs": cells_of(40).assign(label=lambda rows: 1 - rows["label"])}
    ours, theirs = (
        str(write_results(tmp_path / name, of[name], has_images=False, archive=tmp_path / "archive")) for name in of
    )
    with pytest.raises(DatasetError, match=r"40 images have several labels .* uninfected in .*; give results of one"):
        evaluate.run(evaluate.Config(results=ours, against=theirs, n_resamples=100))
    assert not Path(ours, "differences").exists()


def test_a_comparison_says_which_model_knows_the_patients(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    of = {
        "by-patient": cells_of(240),
        "by-image": cells_of(240).assign(split=np.resize(["train", "test", "test"], 240)),
    }
    ours, theirs = (write_results(tmp_path / name, of[name], has_images=False, archive=tmp_path / "a") for name in of)
    evaluate.run(evaluate.Config(results=str(ours), against=str(theirs), n_resamples=100))
    n = ((of["by-patient"]["split"] == "test") & (of["by-image"]["split"] == "test")).sum()
    told = " ".join(capsys.readouterr().out.split())
    assert f"by-image: {n} of {n} shared held-out cells are of patients that the run was trained or tuned on:" in told
    assert "by-patient: " not in told
