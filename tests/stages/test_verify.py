from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from stages.conftest import Line

from malaria_ray.errors import DirectoryError, InvariantError, NotCompleteError
from malaria_ray.runtime import lease, storage
from malaria_ray.stages import evaluate, report, verify


def verify_of(directory: Path) -> None:
    verify.run(verify.Config(directory=str(directory)))


def delete(part: Path) -> None:
    part.unlink()


def double(part: Path) -> None:
    shutil.copy(part, part.with_name("part-00099.parquet"))


def truncate(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-100])


def flip_one_bit(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)


def drop_a_row(part: Path) -> None:
    pq.write_table(pq.read_table(part).slice(1), part)


def double_a_row(part: Path) -> None:
    import pyarrow as pa

    table = pq.read_table(part)
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), part)


def test_metrics_of_other_predictions_do_not_hold(line: Line, copy_of):
    results = copy_of(line.results)
    evaluate.run(evaluate.Config(results=str(results), n_resamples=100))
    storage.write_bytes(storage.locate(str(results / "metrics/.0123456789abcdef.tmp")), b"of a killed process")
    verify_of(results)
    marker = storage.locate(str(results / "metrics/_SUCCESS.json"))
    was = storage.read_json(marker)
    predictions = dict.fromkeys(was["identity"]["predictions"], "0" * 64)
    storage.write_json(marker, {**was, "identity": {**was["identity"], "predictions": predictions}})
    with pytest.raises(InvariantError, match="are of other predictions: run 'malaria-ray evaluate' again"):
        verify_of(results)


@pytest.mark.parametrize("stage", [evaluate, report])
def test_what_another_process_writes_is_not_evaluated_or_reported(line: Line, copy_of, stage):
    results = copy_of(line.results)
    for made_by_other_tests in ("metrics", "report"):
        shutil.rmtree(results / made_by_other_tests, ignore_errors=True)
    other = storage.locate(str(results))
    with lease.held(other), pytest.raises(DirectoryError, match="is being written by process"):
        stage.run(stage.Config(results=str(results)))
    assert not (results / "metrics").exists()
    assert not (results / "report").exists()


@pytest.mark.parametrize("directory", ["dataset", "run", "results"])
def test_what_a_stage_left_holds(line: Line, directory: str):
    verify_of(getattr(line, directory))


@pytest.mark.parametrize(("directory", "folder"), [("dataset", "crops"), ("results", "predictions")])
@pytest.mark.parametrize(
    ("spoil", "fault", "names_ids"),
    [
        (delete, "part-00000.parquet is missing", True),
        (double, "part-00099.parquet was not written by the stage", True),
        (truncate, "part-00000.parquet cannot be read", True),
        (flip_one_bit, "part-00000.parquet", False),  # the bytes differ; whether a row does depends on the bit
        (drop_a_row, "part-00000.parquet was changed", True),
        (double_a_row, "part-00000.parquet was changed", True),
    ],
)
def test_a_spoilt_shard_is_found_and_its_images_named(
    line: Line, copy_of, directory: str, folder: str, spoil, fault: str, names_ids: bool
):
    spoilt = copy_of(getattr(line, directory))
    part = spoilt / folder / "part-00000.parquet"
    first_id = pq.read_table(part, columns=["image_id"])["image_id"][0].as_py()
    ids = sorted(pq.read_table(part, columns=["image_id"])["image_id"].to_pylist())
    spoil(part)
    with pytest.raises(InvariantError) as failure:
        verify_of(spoilt)
    assert fault in str(failure.value)
    if names_ids:
        named = first_id if spoil in (drop_a_row, double_a_row) else ids[0]
        assert repr(named) in str(failure.value)


def test_a_config_or_count_changed_by_hand_is_found(line: Line, copy_of):
    results = copy_of(line.results)
    for name, was, now, said in (
        ("run.json", '"threshold": 0.5', '"threshold": 0.1', "run.json was changed"),
        ("_SUCCESS.json", '"n_scored": 240', '"n_scored": 999', "says n_scored 999, the tables have 240"),
        ("_SUCCESS.json", '"n_scored": 240', '"n_scared": 240', "says n_scored None, the tables have 240"),
    ):
        text = (results / name).read_text()
        assert was in text
        (results / name).write_text(text.replace(was, now))
        with pytest.raises(InvariantError, match=said):
            verify_of(results)
        (results / name).write_text(text)
    verify_of(results)


@pytest.mark.parametrize(
    ("directory", "name"), [("dataset", "summary.json"), ("dataset", "samples.png"), ("run", "learning_curves.png")]
)
def test_what_people_look_at_is_the_file_that_was_written(line: Line, copy_of, directory: str, name: str):
    spoilt = copy_of(getattr(line, directory))
    (spoilt / name).write_bytes(b"{}")
    with pytest.raises(InvariantError, match=f"{name} was changed"):
        verify_of(spoilt)


def test_a_metric_changed_by_hand_is_found(line: Line, copy_of):
    results = copy_of(line.results)
    evaluate.run(evaluate.Config(results=str(results), n_resamples=100))
    verify_of(results)
    drop_a_row(results / "metrics" / "part-00000.parquet")
    with pytest.raises(InvariantError, match=r"metrics/part-00000.parquet was changed"):
        verify_of(results)


def test_a_patient_in_two_splits_is_found(line: Line, copy_of):
    run = copy_of(line.run)
    splits = pq.read_table(run / "splits.parquet")
    frame = splits.to_pandas()
    patient = frame.loc[frame["split"] == "train", "patient_id"].iloc[0]
    frame.loc[frame["patient_id"].eq(patient).idxmax(), "split"] = "test"
    pq.write_table(splits.from_pandas(frame, schema=splits.schema), run / "splits.parquet")
    with pytest.raises(InvariantError, match=f"1 patients are in several splits: '{patient}'"):
        verify_of(run)


def test_an_unfinished_or_foreign_directory_is_refused(line: Line, copy_of, tmp_path: Path):
    dataset = copy_of(line.dataset)
    (dataset / "_SUCCESS.json").unlink()
    with pytest.raises(NotCompleteError, match="is not complete"):
        verify_of(dataset)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DirectoryError, match="is no dataset, run or results directory"):
        verify_of(tmp_path / "empty")
