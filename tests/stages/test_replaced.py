"""Archives and datasets that are replaced while they are read, and what goes on afterwards."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from stages.conftest import IMAGE_SIZE, Line
from stages.test_train import train_of

from malaria_ray.archives import open_archive
from malaria_ray.archives.listing import list_archive
from malaria_ray.errors import ArchiveError, DirectoryError
from malaria_ray.runtime import storage
from malaria_ray.stages import ingest, pack, screen, train, verify

N_EACH = 16


def config_of(stage: Any, source: Path, output: Path, line: Line) -> Any:
    if stage is screen:
        return screen.Config(source=str(source), results=str(output), model=str(line.run), max_bad_fraction=1.0)
    if stage is ingest:
        return ingest.Config(archive=str(source), dataset=str(output), image_size=IMAGE_SIZE, max_bad_fraction=1.0)
    return pack.Config(archive=str(source), packed=str(output))


READERS = {screen: ("_score_all", "predictions"), ingest: ("_decode_all", "crops"), pack: ("_pack_all", "images")}


def table_of(stage: Any, output: Path) -> pd.DataFrame:
    table = storage.read_table(storage.locate(str(output / READERS[stage][1]))).to_pandas()
    return table.sort_values("image_id").reset_index(drop=True)


@pytest.fixture
def shards(line: Line, tmp_path: Path) -> Path:
    """Two tars of bitmaps, all of one size: what lies at a wrong place is an image too, or none."""
    with zipfile.ZipFile(line.archive) as archive:
        cells = {name: archive.read(name) for name in archive.namelist()[: 2 * N_EACH]}
    bitmaps = {}
    for number, (name, data) in enumerate(cells.items()):
        pixels = cv2.resize(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), (32, 32))
        bitmaps[f"{name.split('/')[0]}/C{number:03}P{number:03}thin.bmp"] = cv2.imencode(".bmp", pixels)[1].tobytes()
    names = sorted(bitmaps)
    (tmp_path / "shards").mkdir()
    for shard, kept in (("a", names[:N_EACH]), ("b", names[N_EACH:])):
        write_tar(tmp_path / "shards" / f"{shard}.tar", {name: bitmaps[name] for name in kept})
    return tmp_path / "shards"


def write_tar(path: Path, files: dict[str, bytes], comment: str | None = None) -> None:
    """A comment on each member moves all that lies behind."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = {"comment": comment} if comment else {}
            tar.addfile(info, io.BytesIO(data))


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def moved(path: Path) -> None:
    """The same images at other places of a new file."""
    files = read_tar(path)
    path.rename(path.parent.parent / "first")
    write_tar(path, files, comment="x" * 2 * len(next(iter(files.values()))))


def reversed_in_place(path: Path) -> None:
    """The same images, each at another's place, in a new file of the same size and time."""
    was, files = path.stat(), read_tar(path)
    path.rename(path.parent.parent / "first")
    write_tar(path, dict(reversed(files.items())))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert path.stat().st_size == was.st_size


def stopped(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("stage", "is_back"), [(screen, False), (screen, True), (ingest, False), (pack, True)])
def test_what_was_read_at_wrong_places_is_read_again_and_nothing_else(
    stage: Any, is_back: bool, line: Line, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):  # fmt: skip
    stage.run(config_of(stage, shards, tmp_path / "undisturbed", line))
    output, (reader, _) = tmp_path / "output", READERS[stage]
    read = getattr(stage, reader)

    def read_replaced(*arguments: Any, **more: Any) -> Any:
        moved(shards / "b.tar")
        return read(*arguments, **more)

    monkeypatch.setattr(stage, reader, read_replaced)
    with pytest.raises(ArchiveError, match=r"b.tar was replaced while it was read; run again"):
        stage.run(config_of(stage, shards, output, line))
    monkeypatch.setattr(stage, reader, read)
    if is_back:
        (tmp_path / "first").replace(shards / "b.tar")  # time and all: nothing tells that it was ever away
    caplog.clear()
    stage.run(config_of(stage, shards, output, line))
    assert f"{N_EACH} of them are others now and are read again" in caplog.text
    pd.testing.assert_frame_equal(table_of(stage, output), table_of(stage, tmp_path / "undisturbed"))
    verify.run(verify.Config(directory=str(output)))
    if stage is screen:
        timings = storage.read_json(storage.locate(str(output / "_SUCCESS.json")))["timings"]
        assert timings["images_scored"] == N_EACH


def test_the_same_images_at_other_places_cost_no_work_that_is_done(
    line: Line, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    results, score_all = tmp_path / "results", screen._score_all

    def scored_and_stopped(*arguments: Any) -> int:
        score_all(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(screen, "_score_all", scored_and_stopped)
    with pytest.raises(KeyboardInterrupt):
        screen.run(config_of(screen, shards, results, line))
    monkeypatch.setattr(screen, "_score_all", score_all)
    moved(shards / "b.tar")
    screen.run(config_of(screen, shards, results, line))
    assert f"b.tar was replaced since the work was begun: the {N_EACH} files that were read are compared" in caplog.text
    success = storage.read_json(storage.locate(str(results / "_SUCCESS.json")))
    assert (success["timings"]["images_scored"], success["counts"]["n_scored"]) == (0, 2 * N_EACH)


@pytest.mark.parametrize("ending", ["looked at", "killed", "away"])
def test_no_row_is_kept_of_a_file_that_only_its_change_tells_from_the_first(
    ending: str, line: Line, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ingest.run(config_of(ingest, shards, tmp_path / "undisturbed", line))
    output, decode_all = tmp_path / "output", ingest._decode_all

    def read_replaced(*arguments: Any, **more: Any) -> int:
        reversed_in_place(shards / "b.tar")
        n = decode_all(*arguments, **more)
        if ending == "killed":
            raise KeyboardInterrupt
        if ending == "away":
            (shards / "b.tar").unlink()
        return n

    monkeypatch.setattr(ingest, "_decode_all", read_replaced)
    with pytest.raises((ArchiveError, KeyboardInterrupt)):
        ingest.run(config_of(ingest, shards, output, line))
    monkeypatch.setattr(ingest, "_decode_all", decode_all)
    (tmp_path / "first").replace(shards / "b.tar")
    ingest.run(config_of(ingest, shards, output, line))
    pd.testing.assert_frame_equal(table_of(ingest, output), table_of(ingest, tmp_path / "undisturbed"))
    verify.run(verify.Config(directory=str(output)))


@pytest.mark.parametrize("was_opened", [False, True])
def test_files_are_tried_again_in_an_archive_that_is_another_by_now(
    was_opened: bool, line: Line, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rows of the finished results that tell of other bytes are scored anew too."""
    files = {shard: read_tar(shards / f"{shard}.tar") for shard in "ab"}
    bad = next(iter(files["a"]))
    write_tar(shards / "a.tar", files["a"] | {bad: bytes(len(files["a"][bad]))})
    results = tmp_path / "results"
    screen.run(config_of(screen, shards, results, line))
    assert len(table_of(screen, results)) == 2 * N_EACH - 1
    again = replace(config_of(screen, shards, results, line), retry_quarantined="all")
    if was_opened:
        with monkeypatch.context() as patch:
            patch.setattr(screen, "check_same_listing", stopped)
            with pytest.raises(KeyboardInterrupt):
                screen.run(again)
    names = list(files["b"])
    write_tar(shards / "a.tar", files["a"])
    write_tar(shards / "b.tar", files["b"] | {names[0]: files["b"][names[1]], names[1]: files["b"][names[0]]})
    screen.run(again)
    screen.run(config_of(screen, shards, tmp_path / "anew", line))
    pd.testing.assert_frame_equal(table_of(screen, results), table_of(screen, tmp_path / "anew"))
    success = storage.read_json(storage.locate(str(results / "_SUCCESS.json")))
    assert success["timings"]["images_scored"] == 3
    verify.run(verify.Config(directory=str(results)))


@pytest.mark.parametrize("stage", [screen, ingest, pack])
def test_replaced_before_anything_was_read_the_work_goes_on(
    stage: Any, line: Line, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(stage, READERS[stage][0], stopped)
        with pytest.raises(KeyboardInterrupt):
            stage.run(config_of(stage, shards, tmp_path / "output", line))
    moved(shards / "b.tar")
    stage.run(config_of(stage, shards, tmp_path / "output", line))
    assert len(table_of(stage, tmp_path / "output")) == 2 * N_EACH
    verify.run(verify.Config(directory=str(tmp_path / "output")))


def test_crops_that_are_not_those_of_the_dataset_are_not_trained_on(
    line: Line, copy_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dataset = copy_of(line.dataset)
    part = storage.locate(str(dataset / "crops/part-00000.parquet"))
    shutil.copy(part.path, dataset / "crops/part-00001.parquet")
    assert list_archive(open_archive(str(dataset))).num_rows == 240, "as ingest wrote, whatever else lies there"
    assign_splits = train.assign_splits

    def exchange(*arguments: Any, **more: Any) -> Any:
        storage.write_table(part, storage.read_table(part).take(list(reversed(range(240)))))
        return assign_splits(*arguments, **more)

    monkeypatch.setattr(train, "assign_splits", exchange)
    with pytest.raises(DirectoryError, match=r"part-00000.parquet is not the file that was written"):
        train_of(dataset, tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(DirectoryError, match=r"part-00000.parquet is not the file that was written"):
        train_of(dataset, tmp_path / "other")
    assert not (tmp_path / "other").exists()
