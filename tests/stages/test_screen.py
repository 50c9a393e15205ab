from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from stages.conftest import IMAGE_SIZE, Line, content, write_archive
from stages.killing import run_and_kill

from malaria_ray.errors import (
    ArchiveError,
    ConfigError,
    DirectoryError,
    InvariantError,
    ModelError,
    NotCompleteError,
    TooManyBadImagesError,
)
from malaria_ray.runtime import outputs, storage
from malaria_ray.schema import PREDICTIONS, QualityFlag
from malaria_ray.stages import ingest, ledger, screen, verify
from malaria_ray.statistics.calibration import calibrate
from malaria_ray.statistics.validation import Validation


def screen_of(source: Path, results: Path, run: Path, **flags) -> pd.DataFrame:
    screen.run(screen.Config(source=str(source), results=str(results), model=str(run), **flags))
    return predictions_of(results)


def predictions_of(results: Path) -> pd.DataFrame:
    return (
        storage.read_table(storage.locate(str(results / "predictions"))).to_pandas().set_index("image_id").sort_index()
    )


def test_every_image_has_one_score_in_0_1(line: Line):
    predictions = predictions_of(line.results)
    assert list(predictions.reset_index()[PREDICTIONS.names].columns) == PREDICTIONS.names
    assert sorted(predictions.index) == sorted(zipfile.ZipFile(line.archive).namelist())
    assert predictions["score"].between(0, 1).all()
    assert (predictions["predicted_label"] == (predictions["score"] >= 0.5)).all()
    verify.run(verify.Config(directory=str(line.results)))


def test_calibrated_and_raw_scores_novelty_and_flags_are_kept(line: Line):
    predictions = predictions_of(line.results)
    learnt = Validation.from_dict(storage.read_json(storage.locate(str(line.run / "validation.json"))))
    expected = calibrate(predictions["raw_score"].to_numpy(), learnt.calibration.temperature)
    np.testing.assert_allclose(predictions["score"], expected, atol=1e-6)
    assert predictions["novelty"].between(0, np.inf, inclusive="neither").all()
    splits = storage.read_table(storage.locate(str(line.run / "splits.parquet"))).to_pandas().set_index("image_id")
    of_val = predictions["novelty"][splits["split"].reindex(predictions.index) == "val"]
    assert (of_val > 1).mean() <= 0.05, "above 1 for about 1 % of the validation images"
    assert predictions["quality_flags"].map(lambda flags: set(flags) <= set(QualityFlag)).all()


def test_archive_and_dataset_give_the_same_scores(line: Line, tmp_path: Path):
    of_dataset = screen_of(line.dataset, tmp_path / "results", line.run)
    pd.testing.assert_frame_equal(of_dataset, predictions_of(line.results))


def test_scores_do_not_depend_on_actors_or_on_the_order_of_the_archive(line: Line, tmp_path: Path):
    with zipfile.ZipFile(line.archive) as original, zipfile.ZipFile(tmp_path / "cells.zip", "w") as reordered:
        for name in reversed(original.namelist()):
            reordered.writestr(name, original.read(name))
    again = screen_of(tmp_path / "cells.zip", tmp_path / "results", line.run, num_actors="1")
    np.testing.assert_array_equal(again["score"], predictions_of(line.results)["score"])


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [({"batch_size": 7}, 1e-6), ({"engine": "onnx"}, 1e-5), ({"engine": "keras"}, 1e-4)],
    ids=["batch size", "ONNX Runtime", "Keras"],
)
def test_scores_do_not_depend_on(line: Line, tmp_path: Path, flags: dict, tolerance: float):
    again = screen_of(line.dataset, tmp_path / "results", line.run, **flags)
    np.testing.assert_allclose(again["score"], predictions_of(line.results)["score"], atol=tolerance, rtol=0)


def test_a_split_is_screened_alone(line: Line, tmp_path: Path):
    test_only = screen_of(line.dataset, tmp_path / "results", line.run, split="test")
    splits = pq.read_table(line.run / "splits.parquet").to_pandas()
    assert sorted(test_only.index) == sorted(splits.loc[splits["split"] == "test", "image_id"])


def test_bad_files_are_in_quarantine_and_the_others_scored(line: Line, tmp_path: Path):
    shutil.copy(line.archive, tmp_path / "cells.zip")
    with zipfile.ZipFile(tmp_path / "cells.zip", "a") as archive:
        archive.writestr("cell_images/Thumbs.db", bytes.fromhex("d0cf11e0a1b11ae1"))
        archive.writestr("cell_images/empty.png", b"")
    predictions = screen_of(tmp_path / "cells.zip", tmp_path / "results", line.run)
    pd.testing.assert_frame_equal(predictions, predictions_of(line.results))
    quarantine = pq.read_table(tmp_path / "results/quarantine/part-00000.parquet").to_pandas().set_index("image_id")
    assert quarantine["reason"].to_dict() == {
        "cell_images/Thumbs.db": "not_an_image",
        "cell_images/empty.png": "empty_file",
    }
    assert set(quarantine["stage"]) == {"screen"}
    verify.run(verify.Config(directory=str(tmp_path / "results")))


def test_too_many_bad_files_stop_with_the_reasons(line: Line, tmp_path: Path):
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "a.png").write_text("no image")
    with pytest.raises(TooManyBadImagesError, match="1 of 1 files cannot be used"):
        screen_of(tmp_path / "archive", tmp_path / "results", line.run)
    assert screen_of(tmp_path / "archive", tmp_path / "results", line.run, max_bad_fraction=1.0).empty


def test_a_second_run_changes_nothing_and_says_so(line: Line, copy_of, caplog: pytest.LogCaptureFixture):
    results = copy_of(line.results)
    before = content(results)
    screen_of(line.archive, results, line.run)
    assert content(results) == before
    assert "nothing to do" in caplog.text


def test_killed_in_the_middle_and_run_again_every_image_stands_once(line: Line, tmp_path: Path):
    archive = write_archive(tmp_path / "cells.zip", n_patients=40, n_cells_per_patient=60)
    arguments = ["screen", str(archive), str(tmp_path / "killed"), "--model", str(line.run)]
    run_and_kill(arguments, when=tmp_path / "killed/_work/*/checkpoint/*[0-9].parquet")
    n_before = len(ledger.keys_done(outputs.work_of(storage.locate(str(tmp_path / "killed")), "screen")))
    assert 0 < n_before < 2400
    killed = screen_of(archive, tmp_path / "killed", line.run)
    timings = storage.read_json(storage.locate(str(tmp_path / "killed/_SUCCESS.json")))["timings"]
    # Actors of the killed driver may have committed more before they ended, or even while the next run scores.
    assert 0 < timings["images_scored"] <= 2400 - n_before, "what was finished before the kill is not scored again"
    pd.testing.assert_frame_equal(killed, screen_of(archive, tmp_path / "undisturbed", line.run))
    verify.run(verify.Config(directory=str(tmp_path / "killed")))


def test_rows_that_a_dying_run_scored_a_second_time_stand_once(line: Line, tmp_path: Path):
    results = tmp_path / "results"
    run_and_kill(
        ["screen", str(line.archive), str(results), "--model", str(line.run)],
        when=results / "_work/*/checkpoint/*[0-9].parquet",
    )
    work = outputs.work_of(storage.locate(str(results)), "screen")
    [rows, *_] = ledger.read_files(ledger.committed_files(work).values())
    ledger.reopen(work, rows, "again")
    twice = screen_of(line.archive, results, line.run)
    pd.testing.assert_frame_equal(twice, predictions_of(line.results))
    verify.run(verify.Config(directory=str(results)))


def test_another_model_is_refused_for_the_same_results(line: Line, copy_of):
    results, run = copy_of(line.results), copy_of(line.run)
    success = storage.read_json(storage.locate(str(run / "_SUCCESS.json")))
    storage.write_json(storage.locate(str(run / "_SUCCESS.json")), {**success, "run_id": "cnn-of-tomorrow"})
    with pytest.raises(DirectoryError, match="run_id was 'cnn-.*', is now 'cnn-of-tomorrow'"):
        screen_of(line.archive, results, run)


def test_a_model_file_that_was_exchanged_is_refused(line: Line, copy_of, tmp_path: Path):
    run = copy_of(line.run)
    (run / "model.onnx").write_bytes((run / "model.onnx").read_bytes() + b"x")
    with pytest.raises(ModelError, match="not the file that training wrote"):
        screen_of(line.archive, tmp_path / "results", run)


@pytest.mark.parametrize("name", ["novelty.npz", "validation.json", "splits.parquet", "history.parquet"])
def test_another_file_of_the_run_that_was_exchanged_is_refused(line: Line, copy_of, tmp_path: Path, name: str):
    run = copy_of(line.run)
    (run / name).write_bytes((run / name).read_bytes() + b" ")
    with pytest.raises(ModelError, match=f"{name} is not the file that training wrote"):
        screen_of(line.archive, tmp_path / "results", run)


def test_a_model_that_is_exchanged_while_its_scorers_start_scores_nothing(
    line: Line, copy_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = copy_of(line.run)

    def exchange(config):
        (run / "model.onnx").write_bytes((run / "model.onnx").read_bytes() + b"x")
        return pool(config)

    pool = screen._pool
    monkeypatch.setattr(screen, "_pool", exchange)
    with pytest.raises(ModelError, match=r"model.onnx is not the file that training wrote"):
        screen_of(line.archive, tmp_path / "results", run)


FAIL_AND_LOOK = """
import gc, sys, time
import ray
from malaria_ray.errors import ModelError
from malaria_ray.runtime import session
from malaria_ray.stages import screen
gc.disable()  # else it is a matter of luck when Python finds the error that nobody holds any more
ray.init(address="local", num_cpus=2, include_dashboard=False)
try:
    screen.run(screen.Config(source=sys.argv[1], results=sys.argv[2], model=sys.argv[3]))
except ModelError:
    print("failed")
with session.ray_session():
    end = time.monotonic() + 30
    while (free := ray.available_resources().get("CPU")) != 2 and time.monotonic() < end:
        time.sleep(0.1)
print("free:", free)
"""


def test_actors_of_a_failed_screening_hold_no_cpu_of_the_next(line: Line, copy_of, tmp_path: Path):
    run = copy_of(line.run)
    (run / "novelty.npz").write_bytes(b"x")
    script = [sys.executable, "-c", FAIL_AND_LOOK, str(line.archive), str(tmp_path / "results"), str(run)]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=200)
    assert "failed\nfree: 2.0" in done.stdout, done.stdout + done.stderr[-2000:]


def test_an_archive_replaced_in_mid_run_is_not_published_and_the_same_one_goes_on(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    archive, results = Path(shutil.copy(line.archive, tmp_path / "cells.zip")), tmp_path / "results"

    def replace_behind(*args):
        n = score_all(*args)
        if n:
            archive.write_bytes(archive.read_bytes())
        return n

    score_all = screen._score_all
    monkeypatch.setattr(screen, "_score_all", replace_behind)
    with pytest.raises(ArchiveError, match=r"cells.zip was replaced while it was read; run again"):
        screen_of(archive, results, line.run)
    assert not (results / "_SUCCESS.json").exists()
    pd.testing.assert_frame_equal(screen_of(archive, results, line.run), predictions_of(line.results))
    assert storage.read_json(storage.locate(str(results / "_SUCCESS.json")))["timings"]["images_scored"] == 0


def test_rows_under_other_names_than_listed_are_not_published(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    results = tmp_path / "results"

    def exchange_two_names(*args):
        n = score_all(*args)
        work = outputs.work_of(storage.locate(str(results)), "screen")
        file = next(iter(ledger.committed_files(work).values()))
        rows = storage.read_table(file)
        storage.write_table(file, rows.set_column(0, "image_id", rows["image_id"].take([1, 0, *range(2, len(rows))])))
        return n

    score_all = screen._score_all
    monkeypatch.setattr(screen, "_score_all", exchange_two_names)
    with pytest.raises(InvariantError, match="2 of 240 rows have another name than the listing; .* is not published"):
        screen_of(line.archive, results, line.run)
    assert not (results / "predictions").exists()


def test_a_dataset_of_another_image_size_is_refused(line: Line, tmp_path: Path):
    ingest.run(ingest.Config(archive=str(line.archive), dataset=str(tmp_path / "other"), image_size=IMAGE_SIZE + 8))
    with pytest.raises(ModelError, match="40 × 40 pixels.* takes 32 × 32"):
        screen_of(tmp_path / "other", tmp_path / "results", line.run)


def test_a_split_of_an_archive_that_the_run_does_not_know_is_refused(line: Line, tmp_path: Path):
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "a.png").write_text("no image")
    with pytest.raises(ConfigError, match="none of the 1 images is in the test split"):
        screen_of(tmp_path / "archive", tmp_path / "results", line.run, split="test")


@pytest.mark.parametrize("made", ["run", "results"])
def test_what_a_stage_made_is_no_archive_of_cells(line: Line, tmp_path: Path, made: str):
    with pytest.raises(ArchiveError, match="was made by 'malaria-ray (train|screen)' and its pictures are no cells"):
        screen_of(getattr(line, made), tmp_path / "results", line.run)


def test_an_unfinished_run_is_refused(line: Line, copy_of, tmp_path: Path):
    run = copy_of(line.run)
    (run / "_SUCCESS.json").unlink()
    with pytest.raises(NotCompleteError, match="no _SUCCESS.json; run 'malaria-ray train' again"):
        screen_of(line.archive, tmp_path / "results", run)
