"""Files behind paths and URLs: a write is seen whole or not at all, on a disk, in memory and on an object store."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from upath import UPath

from malaria_ray.errors import ConfigError, DirectoryError
from malaria_ray.runtime import storage

TABLE = pa.table({"image_id": ["a", "b", "c"], "n": [1, 2, 3]})


@pytest.fixture(params=["disk", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[UPath]:
    """An empty place to write to, on each kind of storage."""
    if request.param == "disk":
        yield storage.locate(str(tmp_path / "out"))
    elif request.param == "memory":
        yield storage.locate("memory://test_storage/out")
        memory = fsspec.filesystem("memory")
        if memory.exists("/test_storage"):
            memory.rm("/test_storage", recursive=True)
    else:
        request.getfixturevalue("s3")
        yield storage.locate("s3://cells-bucket/out")


def test_bytes_json_and_tables_come_back_as_they_were_written(root: UPath) -> None:
    storage.write_bytes(root / "deep" / "er" / "a.bin", b"\0\xff")
    assert (root / "deep" / "er" / "a.bin").read_bytes() == b"\0\xff"
    storage.write_json(root / "a.json", {"ü": [1, None, 0.5], "path": Path("/x")})
    assert storage.read_json(root / "a.json") == {"ü": [1, None, 0.5], "path": "/x"}
    assert (root / "a.json").read_bytes().endswith(b"\n")
    record = storage.write_table(root / "a.parquet", TABLE)
    assert storage.read_table(root / "a.parquet").equals(TABLE)
    assert storage.read_table(root / "a.parquet", columns=["n"]).column_names == ["n"]
    data = (root / "a.parquet").read_bytes()
    assert record == {"bytes": len(data), "rows": 3, "sha256": hashlib.sha256(data).hexdigest()}
    assert storage.record_of(root / "a.parquet") == record


def test_writing_again_replaces(root: UPath) -> None:
    storage.write_bytes(root / "a", b"a longer first content")
    storage.write_bytes(root / "a", b"second")
    assert (root / "a").read_bytes() == b"second"


def test_parts_are_in_order_and_nothing_else(root: UPath) -> None:
    for name in ("part-00010.parquet", "part-00002.parquet", "part-100000.parquet"):
        storage.write_table(root / "crops" / name, TABLE)
    for name in (".part-00003.parquet.tmp", "other.parquet", "part-00004.json", "part-x"):
        storage.write_bytes(root / "crops" / name, b"x")
    names = [path.name for path in storage.parts(root / "crops")]
    assert names == ["part-00002.parquet", "part-00010.parquet", "part-100000.parquet"]
    assert storage.read_table(root / "crops").num_rows == 9


def test_folder_that_is_not_there_has_no_parts(root: UPath) -> None:
    assert storage.parts(root / "none") == []
    assert storage.read_table(root / "none").num_rows == 0


@pytest.mark.parametrize("name", ["run[1]", "a b", "star*", "ü", "what?"])
def test_parts_are_found_in_folders_of_any_name(root: UPath, name: str) -> None:
    path = storage.locate(f"{storage.as_url(root)}/{name}/crops")
    storage.write_table(path / storage.part_name(0), TABLE)
    assert [part.name for part in storage.parts(path)] == ["part-00000.parquet"]


def test_url_of_a_path_leads_back_to_it(root: UPath) -> None:
    storage.write_bytes(root / "a b" / "c.bin", b"x")
    url = storage.as_url(root / "a b" / "c.bin")
    assert storage.locate(url).read_bytes() == b"x"
    assert storage.as_url(storage.locate(url)) == url


def test_arrow_reads_what_was_written(root: UPath) -> None:
    storage.write_table(root / "a.parquet", TABLE)
    filesystem, path = storage.arrow_filesystem(root / "a.parquet")
    assert pq.read_table(path, filesystem=filesystem).equals(TABLE)


def test_removing_takes_files_and_folders_and_what_is_not_there(root: UPath) -> None:
    storage.write_bytes(root / "folder" / "deep" / "a", b"x")
    storage.write_bytes(root / "file", b"x")
    storage.remove(root / "none")
    storage.remove(root / "file")
    assert [path.name for path in root.iterdir()] == ["folder"]
    storage.remove(root / "folder")
    assert not (root / "folder").exists()


def test_what_another_process_wrote_is_seen_after_a_listing(s3: Any) -> None:
    """s3fs keeps listings: the parts that workers wrote would be missing in the driver's tables."""
    folder = storage.locate("s3://cells-bucket/out/crops")
    storage.write_table(folder / storage.part_name(0), TABLE)
    assert len(storage.parts(folder)) == len(list(folder.iterdir())) == 1
    s3.put_object(Bucket="cells-bucket", Key="out/crops/part-00001.parquet", Body=b"by another process")
    assert len(storage.parts(folder)) == 2
    assert (folder / "part-00001.parquet").exists()
    s3.delete_object(Bucket="cells-bucket", Key="out/crops/part-00000.parquet")
    assert [part.name for part in storage.parts(folder)] == ["part-00001.parquet"]


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    path = storage.locate(str(tmp_path))
    storage.write_bytes(path / "a.json", b"x")
    with pytest.raises(TypeError):
        storage.write_bytes(path / "b.json", "no bytes")  # type: ignore[arg-type]
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        storage.write_bytes(path / "folder", b"cannot replace it")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "folder"]


def test_failed_write_leaves_the_old_content(tmp_path: Path) -> None:
    path = storage.locate(str(tmp_path / "a.json"))
    storage.write_bytes(path, b"old")
    with pytest.raises(TypeError):
        storage.write_bytes(path, "no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"


def test_writers_at_once_leave_one_whole_content(tmp_path: Path) -> None:
    """Ray may run a task a second time while the first is still at work."""
    path = storage.locate(str(tmp_path / "part-00000.parquet"))
    contents = [bytes([i]) * 300_000 for i in range(8)]
    failures: list[BaseException] = []

    def write(content: bytes) -> None:
        try:
            for _ in range(5):
                storage.write_bytes(path, content)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            seen.add(path.read_bytes())
    for writer in writers:
        writer.join()
    assert failures == []
    assert seen <= set(contents)
    assert [file.name for file in tmp_path.iterdir()] == ["part-00000.parquet"]


def test_name_as_long_as_the_disk_allows_can_be_written(tmp_path: Path) -> None:
    storage.write_bytes(storage.locate(str(tmp_path / ("x" * 255))), b"x")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("cells", "{cwd}/cells"),
        ("./a/b", "{cwd}/a/b"),
        ("/data/x", "/data/x"),
        ("../b//./c/../x", "{parent}/b/x"),
        ("file:///data/x", "/data/x"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("memory://x/y", "memory://x/y"),
        ("https://host/x.zip", "https://host/x.zip"),
    ],
)
def test_url_for_other_processes(given: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = storage.as_url(storage.locate(given))
    assert url.replace("memory:///", "memory://") == expected.format(cwd=tmp_path, parent=tmp_path.parent)


def test_two_dots_behind_a_link_lead_where_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "there/inside").mkdir(parents=True)
    (tmp_path / "there/cells.zip").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "there/inside")
    assert storage.locate(str(tmp_path / "link/../cells.zip")).read_bytes() == b"x"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "an empty path was given"),
        ("nope://x", r"nope://x: .*; allowed are local paths and fsspec URLs whose client is installed"),
        ("hdfs+x://a", "allowed are local paths"),
        ("s3://", "s3:// names no bucket; give it as s3://BUCKET/NAME"),
    ],
)
def test_unusable_url_is_refused_with_what_is_allowed(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        storage.locate(url)


def test_client_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        ConfigError, match=r"gs://bucket/x: .*pip install 'malaria-ray\[s3\]' for s3://, .*\[gcs\]' for gs"
    ):
        storage.locate("gs://bucket/x")


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'a.json'}'"):
        storage.write_json(storage.locate(str(tmp_path / "a.json")), {})
    assert list(tmp_path.iterdir()) == []


def test_a_recorded_file_that_is_gone_is_told_with_what_to_do(tmp_path: Path) -> None:
    gone = storage.locate(str(tmp_path / "part-00000.parquet"))
    with pytest.raises(DirectoryError, match="part-00000.parquet is gone: its directory is being made anew"):
        storage.read_table(gone, sha256="0" * 64)
    with pytest.raises(FileNotFoundError):
        storage.read_table(gone)
