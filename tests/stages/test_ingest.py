from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from stages.conftest import IMAGE_SIZE, Line, content, write_archive
from stages.killing import run_and_kill
from upath import UPath

from malaria_ray import demo
from malaria_ray.archives import open_archive
from malaria_ray.archives.listing import list_archive
from malaria_ray.cells.images import resize
from malaria_ray.errors import (
    ArchiveError,
    ConfigError,
    DatasetError,
    DirectoryError,
    InvariantError,
    TooManyBadImagesError,
)
from malaria_ray.runtime import outputs, storage
from malaria_ray.schema import MANIFEST, QUARANTINE
from malaria_ray.stages import compare, evaluate, ingest, pack, plan, screen, train, verify

PIXELS = np.full((40, 30, 3), 120, np.uint8)


def png(pixels: np.ndarray = PIXELS) -> bytes:
    return cv2.imencode(".png", pixels)[1].tobytes()


def ingest_of(archive: Path, dataset: Path, **flags) -> pd.DataFrame:
    ingest.run(ingest.Config(archive=str(archive), dataset=str(dataset), image_size=IMAGE_SIZE, **flags))
    return pq.read_table(dataset / "manifest.parquet").to_pandas()


def test_every_file_of_the_archive_is_one_row(line: Line):
    manifest = pq.read_table(line.dataset / "manifest.parquet")
    names = [name for name in zipfile.ZipFile(line.archive).namelist() if not name.endswith("/")]
    assert sorted(manifest["image_id"].to_pylist()) == sorted(names)
    assert manifest.schema.names == MANIFEST.names
    assert set(manifest["status"].to_pylist()) == {"ok"}
    verify.run(verify.Config(directory=str(line.dataset)))


def test_crops_hold_the_resized_pixels_of_their_file(line: Line):
    crops = storage.read_table(storage.locate(str(line.dataset / "crops"))).slice(0, 5).to_pylist()
    with zipfile.ZipFile(line.archive) as archive:
        for crop in crops:
            original = cv2.imdecode(np.frombuffer(archive.read(crop["image_id"]), np.uint8), cv2.IMREAD_COLOR)
            expected = resize(cv2.cvtColor(original, cv2.COLOR_BGR2RGB), IMAGE_SIZE)
            found = np.frombuffer(crop["image"], np.uint8).reshape(IMAGE_SIZE, IMAGE_SIZE, 3)
            np.testing.assert_array_equal(found, expected)
            assert (crop["height"], crop["width"]) == original.shape[:2]


def test_a_bad_file_is_a_row_in_quarantine_and_takes_no_other_with_it(tmp_path: Path):
    files = {
        "Parasitized/C1P1Thin_ok.png": (png(), "ok"),
        "Parasitized/C1P1Thin_same bytes.png": (png(), "ok"),
        "Parasitized/Thumbs.db": (bytes.fromhex("d0cf11e0a1b11ae1") + bytes(100), "not_an_image"),
        "Parasitized/empty.png": (b"", "empty_file"),
        "Parasitized/cut.png": (png()[:-30], "truncated"),
        "Uninfected/text.png": (b"this is text", "not_an_image"),
        "Uninfected/<script>alert(1)</script>\n.png": (png(), "ok"),
        "Uninfected/C201ThinF_ünï ☃.png": (png(PIXELS[..., 0]), "ok"),  # grey
    }
    for name, (data, _) in files.items():
        if "script" in name:  # "/" inside a file name only exists in a zip; on disk it is two folders
            name = name.replace("</script>", "")
        path = tmp_path / "archive" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    manifest = ingest_of(tmp_path / "archive", tmp_path / "dataset").set_index("image_id")
    expected = {name.replace("</script>", ""): status for name, (_, status) in files.items()}
    assert manifest["status"].to_dict() == expected
    assert manifest.loc["Uninfected/C201ThinF_ünï ☃.png", "patient_id"] == "C201"
    quarantine = pq.read_table(tmp_path / "dataset/quarantine/part-00000.parquet")
    assert quarantine.schema.names == QUARANTINE.names
    assert sorted(quarantine["image_id"].to_pylist()) == sorted(k for k, status in expected.items() if status != "ok")
    verify.run(verify.Config(directory=str(tmp_path / "dataset")))


def test_a_folder_and_a_zip_of_the_same_files_give_the_same_dataset(line: Line, tmp_path: Path):
    zipfile.ZipFile(line.archive).extractall(tmp_path / "folder")
    ingest_of(tmp_path / "folder", tmp_path / "dataset")
    digests = [
        storage.read_json(storage.locate(str(d / "_SUCCESS.json")))["dataset_digest"]
        for d in (line.dataset, tmp_path / "dataset")
    ]
    assert digests[0] == digests[1]


def test_a_second_run_changes_nothing_and_says_so(line: Line, copy_of, caplog: pytest.LogCaptureFixture):
    dataset = copy_of(line.dataset)
    before = content(dataset)
    ingest_of(line.archive, dataset)
    assert content(dataset) == before
    assert "nothing to do" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda a, d: ingest_of(a, d, patient_pattern="(?P<patient>x)"), "patient_pattern was None"),
        (
            lambda a, d: ingest.run(ingest.Config(archive=str(a), dataset=str(d), image_size=48)),
            "image_size was 32, is now 48",
        ),
    ],
)
def test_another_config_is_refused_and_the_difference_named(line: Line, copy_of, spoil, message: str):
    dataset = copy_of(line.dataset)
    with pytest.raises(DirectoryError, match=message):
        spoil(line.archive, dataset)


def test_overwrite_makes_it_anew_but_never_deletes_a_foreign_directory(line: Line, copy_of, tmp_path: Path):
    dataset = copy_of(line.dataset)
    (dataset / "crops" / "part-00000.parquet").unlink()
    ingest_of(line.archive, dataset, overwrite=True)
    verify.run(verify.Config(directory=str(dataset)))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("all of it")
    with pytest.raises(DirectoryError, match="was not made by 'malaria-ray ingest'"):
        ingest_of(line.archive, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").exists()


@pytest.mark.parametrize("archive", ["empty", "broken.zip"])
def test_overwrite_deletes_nothing_where_the_archive_is_none(line: Line, copy_of, tmp_path: Path, archive: str):
    dataset = copy_of(line.dataset)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.zip").write_bytes(line.archive.read_bytes()[:1000])
    before = content(dataset)
    for stage, config in (
        (ingest, ingest.Config(archive=str(tmp_path / archive), dataset=str(dataset), overwrite=True)),
        (
            screen,
            screen.Config(
                source=str(tmp_path / archive), results=str(line.results), model=str(line.run), overwrite=True
            ),
        ),
    ):
        with pytest.raises(ArchiveError):
            stage.run(config)
    assert content(dataset) == before
    verify.run(verify.Config(directory=str(line.results)))


def test_overwrite_does_not_delete_the_archive_that_it_is_to_read(line: Line, copy_of):
    dataset = copy_of(line.dataset)
    shutil.copy(line.archive, dataset / "mine.zip")
    with pytest.raises(ConfigError, match="mine.zip lies in .*, which --overwrite would delete"):
        ingest_of(dataset / "mine.zip", dataset, overwrite=True)
    assert (dataset / "mine.zip").read_bytes() == line.archive.read_bytes()
    assert pq.read_table(dataset / "manifest.parquet").num_rows == 240


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_or_keras_refuses_is_told_at_once(seed: int):
    for config in (
        lambda: ingest.Config(archive="a", dataset="d", seed=seed),
        lambda: demo.Config(seed=seed),
        lambda: evaluate.Config(results="r", seed=seed),
        lambda: compare.Config(results=("r", "q"), seed=seed),
        lambda: plan.Config(source="a", model="r", seed=seed),
    ):
        with pytest.raises(ConfigError, match=f"--seed {seed}: allowed are 0 to 4,294,967,295"):
            config()


def test_killed_in_the_middle_and_run_again_it_ends_right(tmp_path: Path):
    archive = write_archive(tmp_path / "cells.zip", n_patients=40, n_cells_per_patient=60, n_copies=4)
    flags = ["ingest", str(archive), str(tmp_path / "killed"), "--image-size", str(IMAGE_SIZE)]
    run_and_kill(flags, when=tmp_path / "killed/_work/*/manifest/part-*.parquet")
    n_finished = len(list((tmp_path / "killed").glob("_work/*/manifest/part-*.parquet")))
    assert 0 < n_finished < 10, "of 10 parts"
    assert not (tmp_path / "killed/_SUCCESS.json").exists()
    killed = ingest_of(archive, tmp_path / "killed")
    undisturbed = ingest_of(archive, tmp_path / "undisturbed")
    pd.testing.assert_frame_equal(killed, undisturbed)
    verify.run(verify.Config(directory=str(tmp_path / "killed")))


def work_of(dataset: Path) -> UPath:
    return outputs.work_of(storage.locate(str(dataset)), "ingest")


def stopped_before_publishing(archive: Path, dataset: Path) -> None:
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "_publish", stop)
        with pytest.raises(KeyboardInterrupt):
            ingest_of(archive, dataset)


def test_what_a_killed_write_left_is_no_record(line: Line, tmp_path: Path):
    stopped_before_publishing(line.archive, tmp_path / "dataset")
    (work_of(tmp_path / "dataset") / "records/.0123456789abcdef.tmp").write_text('{"crops/part-00')
    pd.testing.assert_frame_equal(
        ingest_of(line.archive, tmp_path / "dataset"), pq.read_table(line.dataset / "manifest.parquet").to_pandas()
    )
    verify.run(verify.Config(directory=str(tmp_path / "dataset")))


def test_a_shard_is_not_finished_before_its_record_is_written(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stopped_before_publishing(line.archive, tmp_path / "dataset")
    work = work_of(tmp_path / "dataset")
    shutil.rmtree(work / "manifest")
    listing = list_archive(open_archive(str(line.archive)), patients={}, pattern=None)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        ingest._decode_shard(
            {"shard": 0},
            listing=[ray.put(listing)],
            dataset=str(tmp_path / "dataset"),
            work=str(work),
            image_size=IMAGE_SIZE,
        )
    assert not (work / "manifest").exists()


def one_twice(rows: pa.Table) -> pa.Table:
    return pa.concat_tables([rows.slice(1), rows.slice(1, 1)])


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda rows: rows.slice(1), "239 rows of 240 files"), (one_twice, "239 of them of these files")],
)
def test_rows_that_are_not_those_of_the_listing_are_not_published(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[pa.Table], pa.Table], said: str
):
    def decode_and_lose(listing, dataset, **kwargs):
        n = decode_all(listing, dataset, **kwargs)
        part = outputs.work_of(dataset, "ingest") / "manifest" / "part-00000.parquet"
        storage.write_table(part, change(storage.read_table(part)))
        return n

    decode_all = ingest._decode_all
    monkeypatch.setattr(ingest, "_decode_all", decode_and_lose)
    with pytest.raises(InvariantError, match=f"{said}.* is not published: keep it"):
        ingest_of(line.archive, tmp_path / "dataset")
    assert not (tmp_path / "dataset/_SUCCESS.json").exists()


def test_an_output_inside_the_archives_folder_is_refused_before_anything_is_written(line: Line, tmp_path: Path):
    folder = extracted(line, tmp_path)
    inside = folder / "out"
    for stage, config in (
        (ingest, ingest.Config(archive=str(folder), dataset=str(inside))),
        (pack, pack.Config(archive=str(folder), packed=str(inside))),
        (screen, screen.Config(source=str(folder), results=str(inside), model=str(line.run))),
    ):
        with pytest.raises(ConfigError, match="out lies in .*; give a directory outside"):
            stage.run(config)
        assert not inside.exists()
    in_dataset = line.dataset / "results"
    with pytest.raises(ConfigError, match="results lies in .*; give a directory outside"):
        screen.run(screen.Config(source=str(line.dataset), results=str(in_dataset), model=str(line.run)))
    with pytest.raises(ConfigError, match="results lies in .*; give a directory outside"):
        train.run(train.Config(dataset=str(line.dataset), run=str(in_dataset), model="cnn"))
    in_run = line.run / "results"
    with pytest.raises(ConfigError, match="results lies in .*; give a directory outside"):
        screen.run(screen.Config(source=str(line.archive), results=str(in_run), model=str(line.run)))
    assert not in_dataset.exists()
    assert not in_run.exists()


def test_a_resumed_run_refuses_an_archive_that_changed(line: Line, copy_of, tmp_path: Path):
    archive = Path(shutil.copytree(extracted(line, tmp_path), tmp_path / "changing"))
    ingest_of(archive, tmp_path / "dataset")
    (tmp_path / "dataset/_SUCCESS.json").unlink()
    listing = {"n_files": 1, "digest": "of another archive"}
    storage.write_json(work_of(tmp_path / "dataset") / "listing.json", listing)
    with pytest.raises(ArchiveError, match="the archive changed"):
        ingest_of(archive, tmp_path / "dataset")


def extracted(line: Line, tmp_path: Path) -> Path:
    zipfile.ZipFile(line.archive).extractall(tmp_path / "extracted")
    return tmp_path / "extracted"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is not there"),
        (lambda path: path.mkdir(), "holds no files"),
        (lambda path: path.write_bytes(b"PK"), "unknown kind"),
    ],
    ids=["missing", "empty", "no archive"],
)
def test_an_archive_that_is_none_is_refused_in_one_line(tmp_path: Path, make, message: str):
    make(tmp_path / "archive")
    with pytest.raises(ArchiveError, match=message):
        ingest_of(tmp_path / "archive", tmp_path / "dataset")


def test_an_archive_that_is_wrong_as_a_whole_stops_with_the_reasons(tmp_path: Path):
    (tmp_path / "archive").mkdir()
    for i in range(4):
        (tmp_path / "archive" / f"{i}.txt").write_text("no image")
    (tmp_path / "archive" / "one.png").write_bytes(png())
    with pytest.raises(TooManyBadImagesError, match="4 of 5 files cannot be used \\(not_an_image 4\\)"):
        ingest_of(tmp_path / "archive", tmp_path / "dataset")
    assert len(ingest_of(tmp_path / "archive", tmp_path / "dataset", max_bad_fraction=1.0)) == 5


def test_the_summary_of_another_split_is_shown_of_a_finished_dataset_too(line: Line, copy_of, capsys):
    dataset = copy_of(line.dataset)
    before = content(dataset)
    ingest_of(line.archive, dataset, split_by="patient", seed=7)
    assert "training split by patient, seed 7" in capsys.readouterr().out
    assert content(dataset) == before


def test_a_split_that_cannot_be_made_is_said_before_anything_is_decoded(tmp_path: Path):
    for number in range(3):
        (tmp_path / "archive" / "unsorted").mkdir(parents=True, exist_ok=True)
        (tmp_path / "archive" / "unsorted" / f"{number}.png").write_bytes(png())
    with pytest.raises(DatasetError, match="3 of 3 cells have no label, 'unsorted/0.png' the first"):
        ingest_of(tmp_path / "archive", tmp_path / "dataset", split_by="image")
    assert not (tmp_path / "dataset").exists()


def test_the_summary_measures_the_training_split_when_one_is_named(line: Line, tmp_path: Path):
    ingest_of(line.archive, tmp_path / "dataset", split_by="patient", seed=42)
    summary = storage.read_json(storage.locate(str(tmp_path / "dataset/summary.json")))
    splits = pq.read_table(line.run / "splits.parquet").to_pandas()
    manifest = pq.read_table(line.dataset / "manifest.parquet").to_pandas().set_index("image_id")
    widths = manifest.loc[splits.loc[splits["split"] == "train", "image_id"], "width"]
    assert summary["measured"]["n"] == len(widths)
    assert summary["measured"]["pixels"]["width"] == {
        "min": widths.min(),
        "mean": round(widths.mean(), 2),
        "median": widths.median(),
        "max": widths.max(),
    }
