"""The protocol of output directories: fresh, begun, finished; and whose they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from malaria_ray.errors import ConfigError, DirectoryError, InvariantError, NotCompleteError
from malaria_ray.runtime import lease, outputs, storage
from malaria_ray.schema import PREDICTIONS


@pytest.fixture(autouse=True)
def _writes_arrive_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stores are in this process, and tests/runtime/test_lease.py looks at those who begin together."""
    monkeypatch.setattr(lease, "_SETTLE_S", 0.1)


@dataclass(frozen=True, kw_only=True)
class Config:
    archive: str = "cells.zip"
    image_size: int = 125
    patients: tuple[str, ...] = ()


@pytest.fixture(params=["disk", "memory", "s3"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[UPath]:
    """A directory that is not there yet, on each kind of storage."""
    if request.param == "disk":
        yield storage.locate(str(tmp_path / "out"))
    elif request.param == "memory":
        yield storage.locate("memory://test_outputs/out")
        memory = fsspec.filesystem("memory")
        if memory.exists("/test_outputs"):
            memory.rm("/test_outputs", recursive=True)
    else:
        request.getfixturevalue("s3")
        yield storage.locate("s3://cells-bucket/out")


@pytest.fixture
def on_disk(tmp_path: Path) -> UPath:
    return storage.locate(str(tmp_path / "out"))


def prepare(path: UPath, *, stage: str = "ingest", overwrite: bool = False, **identity: Any) -> bool:
    identity = {"archive": "cells.zip", "image_size": 125} | identity
    claim = outputs.claim(path, stage=stage, config=Config(), identity=identity, overwrite=overwrite)
    if claim is not None:
        with outputs.one_writer():
            claim.begin()
    return claim is not None


def finish(path: UPath) -> None:
    outputs.finish(path, counts={"n_files": 3}, files={}, timings={"total_s": 1.5}, dataset_digest="d1")


def tree(path: UPath) -> list[str]:
    root = path.path.rstrip("/")
    return sorted(found[len(root) + 1 :] for found in path.fs.find(root))


def test_fresh_directory_is_claimed_by_its_config(path: UPath) -> None:
    assert prepare(path) is True
    config = storage.read_json(path / "config.json")
    assert config["stage"] == "ingest"
    assert config["identity"] == {"archive": "cells.zip", "image_size": 125}
    assert config["config"] == {"archive": "cells.zip", "image_size": 125, "patients": []}
    assert config["created_at"].endswith("+00:00")
    assert {"malaria_ray", "code_digest", "python", "packages", "command"} <= config["provenance"].keys()
    assert tree(path) == ["config.json"]


def test_begun_directory_is_resumed_and_its_config_stays(path: UPath) -> None:
    prepare(path)
    before = (path / "config.json").read_bytes()
    storage.write_bytes(path / "_work" / "part", b"x")
    assert prepare(path) is True
    assert (path / "config.json").read_bytes() == before
    assert tree(path) == ["_work/part", "config.json"]


def test_finished_directory_has_no_work_and_is_left_alone(path: UPath) -> None:
    prepare(path)
    storage.write_bytes(path / "_work" / "deep" / "part", b"x")
    storage.write_bytes(path / "manifest.parquet", b"x")
    finish(path)
    assert tree(path) == ["_SUCCESS.json", "config.json", "manifest.parquet"]
    assert prepare(path) is False
    success = outputs.check_complete(path, "ingest")
    assert (success["counts"], success["timings"]) == ({"n_files": 3}, {"total_s": 1.5})
    assert success["dataset_digest"] == "d1"
    assert success["finished_at"].endswith("+00:00")


@pytest.mark.parametrize("is_finished", [False, True])
def test_other_config_is_refused_with_every_difference(path: UPath, is_finished: bool) -> None:
    prepare(path, patients=["a"])
    if is_finished:
        finish(path)
    with pytest.raises(DirectoryError) as caught:
        prepare(path, image_size=64, patients=["b"], pattern="x")
    state = "finished" if is_finished else "begun"
    assert str(caught.value) == (
        f"{path} was {state} with another config: image_size was 125, is now 64; patients was ['a'], is now ['b']; "
        "pattern was None, is now 'x'; choose another directory, or --overwrite to delete it and begin again"
    )


def test_identity_is_compared_as_json_gives_it_back(on_disk: UPath) -> None:
    prepare(on_disk, patients=("a", "b"), where=Path("/x"))
    assert prepare(on_disk, patients=("a", "b"), where=Path("/x")) is True


@pytest.mark.parametrize(
    ("stage", "file"), [("ingest", "config.json"), ("train", "config.json"), ("screen", "run.json")]
)
def test_each_stage_has_its_config_file_and_knows_its_own(on_disk: UPath, stage: str, file: str) -> None:
    prepare(on_disk, stage=stage)
    assert tree(on_disk) == [file]
    assert outputs.stage_of(on_disk) == stage
    assert outputs.read_config(on_disk, stage)["stage"] == stage
    other = "train" if stage == "ingest" else "ingest"
    with pytest.raises(DirectoryError, match=f"was not made by 'malaria-ray {other}'"):
        prepare(on_disk, stage=other)
    with pytest.raises(DirectoryError, match=f"was not made by 'malaria-ray {other}'"):
        outputs.read_config(on_disk, other)


def test_empty_directory_is_taken(on_disk: UPath) -> None:
    on_disk.mkdir()
    assert outputs.stage_of(on_disk) is None
    assert prepare(on_disk) is True


FOREIGN = {
    "photos": {"holiday.jpg": b"x"},
    "hidden": {".git/config": b"x"},
    "another tool's config": {"config.json": b'{"model_type": "bert"}', "model.bin": b"x"},
    "a list for a config": {"config.json": b"[1, 2]"},
    "a null for a config": {"config.json": b"null"},
    "another stage": {"config.json": b'{"stage": "train", "identity": {}}'},
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_directory_is_refused_and_never_deleted(path: UPath, case: str, overwrite: bool) -> None:
    for name, data in FOREIGN[case].items():
        storage.write_bytes(path / name, data)
    with pytest.raises(DirectoryError, match="was not made by 'malaria-ray ingest'; (choose|--overwrite does not del)"):
        prepare(path, overwrite=overwrite)
    assert {name: (path / name).read_bytes() for name in tree(path)} == FOREIGN[case]


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_in_the_way_is_refused_and_never_deleted(on_disk: UPath, overwrite: bool) -> None:
    on_disk.write_bytes(b"a letter")
    with pytest.raises(DirectoryError, match="is a file and no directory; choose another place"):
        prepare(on_disk, overwrite=overwrite)
    assert on_disk.read_bytes() == b"a letter"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b'{"stage": "ingest"}', b'{"stage": "ingest", "identity": 3}'],
    ids=["empty", "cut", "binary", "no identity", "odd identity"],
)  # fmt: skip
def test_damaged_config_is_told_and_the_directory_left_alone(on_disk: UPath, data: bytes, overwrite: bool) -> None:
    storage.write_bytes(on_disk / "config.json", data)
    storage.write_bytes(on_disk / "precious", b"x")
    with pytest.raises(DirectoryError, match=r"config.json is damaged: .*; choose another directory"):
        prepare(on_disk, overwrite=overwrite)
    assert tree(on_disk) == ["config.json", "precious"]


@pytest.mark.parametrize("is_finished", [False, True])
def test_overwrite_begins_again_with_nothing_left(path: UPath, is_finished: bool) -> None:
    prepare(path)
    storage.write_bytes(path / "crops" / "part-00000.parquet", b"x")
    storage.write_bytes(path / "_work" / "part", b"x")
    if is_finished:
        finish(path)
    assert prepare(path, overwrite=True, image_size=64) is True
    assert tree(path) == ["config.json"]
    assert outputs.read_config(path, "ingest")["identity"]["image_size"] == 64


def test_overwrite_of_what_is_not_there_is_a_fresh_start(path: UPath) -> None:
    assert prepare(path, overwrite=True) is True
    assert tree(path) == ["config.json"]


def test_overwrite_keeps_the_directory_itself(on_disk: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a mount point, the target of a link, or where the shell stands."""
    prepare(on_disk)
    finish(on_disk)
    node = Path(on_disk.path).stat().st_ino
    link = storage.locate(on_disk.path + "_link")
    Path(link.path).symlink_to(on_disk.path)
    monkeypatch.chdir(on_disk.path)
    for same in (on_disk, link, storage.locate(".")):
        assert prepare(same, overwrite=True) is True
    assert Path(on_disk.path).stat().st_ino == node
    assert Path(link.path).is_symlink()


def test_deletion_killed_half_way_is_never_taken_for_a_result(on_disk: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(on_disk)
    for name in ("crops/a", "quarantine/b", "manifest.parquet"):
        storage.write_bytes(on_disk / name, b"x")
    finish(on_disk)
    whole = storage.remove
    left = [1]

    def killed(path: UPath) -> None:
        if path.name != lease.FILE and not left:
            raise KeyboardInterrupt
        if path.name != lease.FILE:
            left.pop()
        whole(path)

    monkeypatch.setattr(storage, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(on_disk, overwrite=True)
    monkeypatch.undo()
    assert len(tree(on_disk)) >= 3  # half is still there
    with pytest.raises(DirectoryError, match="deletion was 'begun by --overwrite, not finished', is now None"):
        prepare(on_disk)
    assert prepare(on_disk, overwrite=True) is True
    assert tree(on_disk) == ["config.json"]


def test_complete_directory_is_asked_for_with_what_to_do(path: UPath) -> None:
    with pytest.raises(NotCompleteError, match="is not there; it is made by 'malaria-ray ingest'"):
        outputs.check_complete(path, "ingest")
    prepare(path)
    with pytest.raises(NotCompleteError, match=r"is not complete: no _SUCCESS.json; run 'malaria-ray ingest' again"):
        outputs.check_complete(path, "ingest")
    with pytest.raises(DirectoryError, match=r"not made by 'malaria-ray screen': it has no run.json of that stage"):
        outputs.check_complete(path, "screen")
    finish(path)
    assert outputs.check_complete(path, "ingest")["counts"] == {"n_files": 3}


def test_damaged_marker_is_told(on_disk: UPath) -> None:
    prepare(on_disk)
    storage.write_bytes(on_disk / "_SUCCESS.json", b'{"counts": ')
    with pytest.raises(DirectoryError, match=r"_SUCCESS.json is damaged: .* anew with --overwrite"):
        outputs.check_complete(on_disk, "ingest")


def test_marker_is_the_last_that_is_written(on_disk: UPath) -> None:
    prepare(on_disk)
    storage.write_bytes(on_disk / "_work" / "part", b"x")
    storage.write_bytes(on_disk / "crops" / "part", b"x")
    finish(on_disk)
    files = [Path(on_disk.path) / name for name in tree(on_disk)]
    assert max(files, key=lambda file: file.stat().st_mtime_ns).name == "_SUCCESS.json"
    assert json.loads((Path(on_disk.path) / "_SUCCESS.json").read_text())["files"] == {}


def test_a_table_says_what_it_is_made_from_and_repeats_only_what_repeats(tmp_path: Path):
    path = UPath(tmp_path / "results")
    identity = {"model_digest": "ab", "split": "all"}
    with outputs.one_writer():
        outputs.claim(path, stage="screen", config=Config(), identity=identity, overwrite=False).begin()
    rows = [{"image_id": f"{i}", "patient_id": "P1", "score": i / 4, "model": "cnn"} for i in range(4)]
    table = pa.Table.from_pylist(rows, schema=PREDICTIONS.arrow_schema())
    record = outputs.write_table(path, "predictions/a.parquet", table, stage="screen", sorted_by=["patient_id"])
    assert record == {"predictions/a.parquet": storage.record_of(path / "predictions" / "a.parquet")}
    footer = pq.read_metadata(tmp_path / "results" / "predictions" / "a.parquet")
    said = json.loads(footer.metadata[b"malaria_ray.provenance"])
    assert said["identity"] == identity
    assert said["stage"] == "screen"
    assert said["code_digest"]
    assert "pyarrow" in said["packages"]
    assert footer.metadata[b"malaria_ray.table"] == b"predictions"
    group = footer.row_group(0)
    assert [column.column_index for column in group.sorting_columns] == [1]
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert {name for name, column in columns.items() if column.has_dictionary_page} == {
        *("patient_id", "label", "predicted_label", "model", "run_id")
    }
    assert all(column.compression == "ZSTD" and column.has_offset_index for column in columns.values())


@pytest.mark.parametrize("name", ["run[1]", "batch-*", "batch-?"])
def test_a_name_that_is_a_pattern_is_refused_where_clients_take_it_for_one(s3: Any, name: str, tmp_path: Path) -> None:
    """fsspec would delete batch-1 and batch-2 for batch-*."""
    neighbour = storage.locate("s3://cells-bucket/batch-1")
    prepare(neighbour)
    kept = tree(neighbour)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="in its name, which clients of object stores take for a pattern"):
            prepare(storage.locate(f"s3://cells-bucket/{name}"), overwrite=overwrite)
    assert tree(neighbour) == kept
    on_disk = storage.locate(str(tmp_path / name))
    prepare(on_disk)
    finish(on_disk)
    assert tree(on_disk) == ["_SUCCESS.json", "config.json"]


def test_a_directory_that_another_process_writes_is_not_touched(path: UPath) -> None:
    prepare(path)
    storage.write_bytes(path / "_work" / "part", b"x")
    with lease.held(path):
        before = tree(path)
        for flags in ({}, {"overwrite": True}, {"overwrite": True, "image_size": 64}):
            with pytest.raises(DirectoryError, match="is being written by process"):
                prepare(path, **flags)
        assert tree(path) == before
    assert prepare(path) is True


def test_a_stage_holds_its_directory_to_its_end_and_not_beyond(on_disk: UPath) -> None:
    @outputs.one_writer()
    def run() -> None:
        claim = outputs.claim(on_disk, stage="ingest", config=Config(), identity={}, overwrite=False)
        assert claim is not None
        claim.begin()
        assert (on_disk / lease.FILE).exists()
        finish(on_disk)

    run()
    assert tree(on_disk) == ["_SUCCESS.json", "config.json"]


def test_after_overwrite_what_an_earlier_worker_still_writes_is_nobodys(on_disk: UPath) -> None:
    prepare(on_disk)
    before = outputs.work_of(on_disk, "ingest")
    prepare(on_disk)
    assert outputs.work_of(on_disk, "ingest") == before, "a resumption goes on with it"
    prepare(on_disk, overwrite=True)
    after = outputs.work_of(on_disk, "ingest")
    assert before != after
    assert before.parent == after.parent == on_disk / outputs.WORK


def test_killed_behind_its_end_a_directory_is_finished_and_the_next_run_tidies_up(path: UPath) -> None:
    prepare(path)
    finish(path)
    storage.write_bytes(path / "_work" / "deep" / "part", b"x")
    assert prepare(path) is False
    assert tree(path) == ["_SUCCESS.json", "config.json"]


def test_work_is_there_until_the_directory_is_finished(path: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(path)
    storage.write_bytes(path / "_work" / "part", b"x")

    def killed(file: UPath, content: dict) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        finish(path)
    assert tree(path) == ["_work/part", "config.json"]


@pytest.mark.parametrize("what", ["finished", "begun anew", "begun"])
def test_a_directory_that_changed_since_it_was_claimed_is_left_alone(path: UPath, what: str) -> None:
    if what != "begun":
        prepare(path)
    identity = {"archive": "cells.zip", "image_size": 125}
    claim = outputs.claim(path, stage="ingest", config=Config(), identity=identity, overwrite=False)
    assert claim is not None
    if what == "finished":
        finish(path)
    else:
        prepare(path, overwrite=what == "begun anew", image_size=125)
    before = tree(path)
    with (
        outputs.one_writer(),
        pytest.raises(DirectoryError, match="was finished or changed by another process meanwhile; run again"),
    ):
        claim.begin()
    assert tree(path) == before
    assert prepare(path) is (what != "finished")


def test_what_is_added_to_a_finished_directory_is_added_to_the_one_that_was_read(path: UPath) -> None:
    prepare(path)
    finish(path)
    success = outputs.check_complete(path, "ingest")
    with outputs.one_writer():
        outputs.hold_finished(path, "ingest", success)
        outputs.hold_finished(path, "ingest", success)  # twice is no other process
        assert (path / lease.FILE).exists()
    prepare(path, overwrite=True)
    finish(path)
    storage.write_json(path / outputs.SUCCESS, {**success, "counts": {"n_files": 4}})
    with outputs.one_writer(), pytest.raises(DirectoryError, match="was finished or changed by another process"):
        outputs.hold_finished(path, "ingest", success)


def test_work_of_a_finished_directory_that_another_process_opens_again_is_left(path: UPath) -> None:
    prepare(path)
    finish(path)
    storage.write_bytes(path / "_work/part", b"1")
    with outputs.one_writer():
        outputs.hold(path)
        assert not prepare(path)
        assert (path / "_work/part").exists()
    assert not prepare(path)
    assert not (path / "_work").exists()


def test_a_writer_whose_directory_was_made_anew_finishes_nothing(path: UPath) -> None:
    prepare(path)
    with outputs.one_writer():
        outputs.hold(path)
        storage.remove(path / lease.FILE)  # as a successor does who took it, wrote all anew and ended
        for change in (
            lambda: finish(path),
            lambda: outputs.write_table(path, "t.parquet", pa.table({"x": [1]}), stage="ingest"),
        ):
            with pytest.raises(DirectoryError, match="was written by another process; this one stops"):
                change()
    assert not (path / outputs.SUCCESS).exists()


def test_what_a_process_was_writing_as_it_was_killed_keeps_nobody_out(on_disk: UPath) -> None:
    storage.write_bytes(on_disk / ".0123456789abcdef.tmp", b"{")
    assert prepare(on_disk)
    storage.remove(on_disk / "config.json")
    assert prepare(on_disk, overwrite=True)
    storage.remove(on_disk / "config.json")
    storage.write_bytes(on_disk / ".notes.tmp", b"mine")
    with pytest.raises(DirectoryError, match="was not made by"):
        prepare(on_disk)


@pytest.mark.parametrize("spoil", ["removed", "rewritten"])
@pytest.mark.parametrize("name", ["top.json", "crops/part-00000.parquet"])
def test_files_that_do_not_lie_there_as_written_are_not_published(path: UPath, name: str, spoil: str) -> None:
    prepare(path)
    storage.write_bytes(path / name, b"as written")
    records = {name: storage.FileRecord(bytes=10, rows=0, sha256="")}
    if spoil == "removed":
        storage.remove(path / name)
        storage.write_bytes((path / name).with_name("other"), b"x")
    else:
        storage.write_bytes(path / name, b"by another")
        storage.write_bytes(path / name, b"by another process")
    with pytest.raises(InvariantError, match=f"{name} has (no|18) bytes, 10 were written: something else"):
        outputs.finish(path, counts={}, files=records, timings={})
    assert not (path / outputs.SUCCESS).exists()
    storage.write_bytes(path / name, b"as written")
    outputs.finish(path, counts={}, files=records, timings={})


def test_an_output_below_a_file_or_at_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, said in (
        ("file", "file is a file and no directory"),
        ("file/sub/results", "file is a file and no directory"),
        ("link", "link is a link to nothing and no directory"),
        ("link/results", "link is a link to nothing and no directory"),
    ):
        with pytest.raises(DirectoryError, match=f"{said}; choose another place for the output"):
            prepare(storage.locate(str(tmp_path / name)))
    assert {file.name for file in tmp_path.iterdir()} == {"file", "link"}
