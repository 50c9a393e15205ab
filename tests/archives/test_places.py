"""The same cells whatever they are packed in and wherever that lies, also behind an object store that fails now and
then.
"""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import samples
from samples import zip_of
from servers import FaultyProxy, Site, faulty, serve

from malaria_ray.archives import containers, open_archive, reading
from malaria_ray.archives.listing import list_archive
from malaria_ray.archives.reading import read_cells

FILES = {
    f"cell_images/{folder}/C{i}P{i}thinF_{i}.png": samples.noise(i)
    for folder, numbers in (("Parasitized", range(20)), ("Uninfected", range(20, 40)))
    for i in numbers
} | {
    "cell_images/Parasitized/Thumbs.db": samples.THUMBS_DB,
    "cell_images/Uninfected/C1_thinF_ü.jpg": samples.good_files()["jpeg-rgb"],
    "cell_images/Uninfected/cut.png": samples.noise(4)[:-50],
    "cell_images/Uninfected/empty.png": b"",
    "unlabelled.bmp": samples.good_files()["bmp-rgb"],
}


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    images = [{"bytes": data, "path": name} for name, data in files.items()]
    pq.write_table(pa.table({"image": images}), buffer, row_group_size=7)
    return buffer.getvalue()


def halves(files: dict[str, bytes]) -> list[dict[str, bytes]]:
    return [{name: files[name] for name in list(files)[part::2]} for part in range(2)]


# What is written, by name, and which of the names is the archive ('' for the folder of all of them).
PACKED: dict[str, tuple[dict[str, bytes], str]] = {
    "folder": (FILES, ""),
    "zip": ({"cells.zip": zip_of(FILES)}, "cells.zip"),
    "tar": ({"cells.tar": tar_of(FILES)}, "cells.tar"),
    "tar shards": ({f"{i:06d}.tar": tar_of(half) for i, half in enumerate(halves(FILES))}, ""),
    "parquet": ({"cells.parquet": parquet_of(FILES)}, "cells.parquet"),
    "parquet files": ({f"data/{i}.parquet": parquet_of(half) for i, half in enumerate(halves(FILES))}, ""),
}


def cells(url: str) -> dict[str, dict[str, Any]]:
    """All that is known of each cell, its pixels too."""
    read = read_cells(list_archive(open_archive(url)), image_size=24)
    pixels = iter(read.pixels)
    rows = read.table.to_pylist()
    for row in rows:
        row["pixels"] = next(pixels).tobytes() if row["status"] == "ok" else None
    return {row["image_id"]: row for row in rows}


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found = cells(str(write(tmp_path_factory.mktemp("cells"), FILES)))
    assert set(found) == set(FILES)
    assert sum(row["status"] == "ok" for row in found.values()) == 42
    return found


@pytest.mark.parametrize("kind", [kind for kind in PACKED if kind != "folder"])
def test_on_a_disk(tmp_path: Path, expected: dict[str, dict[str, Any]], kind: str) -> None:
    files, name = PACKED[kind]
    assert cells(str(write(tmp_path, files) / name)) == expected


@pytest.mark.parametrize("kind", ["zip", "tar", "parquet"])
def test_behind_http_with_ranges(expected: dict[str, dict[str, Any]], kind: str) -> None:
    files, name = PACKED[kind]
    with serve(Site({f"/data/{name}": files[name]})) as site:
        assert cells(f"{site.url}/data/{name}") == expected
        assert all(range_ for range_ in site.gets())


def upload(s3: Any, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        s3.put_object(Bucket="cells-bucket", Key=f"in/{name}", Body=data)


@pytest.mark.parametrize("kind", PACKED)
def test_on_s3(s3: Any, expected: dict[str, dict[str, Any]], kind: str) -> None:
    files, name = PACKED[kind]
    upload(s3, files)
    assert cells(f"s3://cells-bucket/in/{name}".rstrip("/")) == expected


@pytest.mark.parametrize(("kind", "name"), [("zip", "a?b.zip"), ("tar", "a?b.tar"), ("folder", "cells.zip")])
def test_on_s3_under_a_name_that_looks_like_something_else(
    s3: Any, expected: dict[str, dict[str, Any]], kind: str, name: str
) -> None:
    files, packed = PACKED[kind]
    upload(s3, {f"{name}/{file}": data for file, data in files.items()} if kind == "folder" else {name: files[packed]})
    assert cells(f"s3://cells-bucket/in/{name}") == expected


def test_key_of_s3_that_its_client_takes_for_a_version_is_not_read_as_another_object(s3: Any) -> None:
    upload(s3, {"a.png": samples.noise(1), "a.png?versionId=null": samples.noise(2), "b?c.png": samples.noise(3)})
    table = read_cells(list_archive(open_archive("s3://cells-bucket/in")), image_size=24).table
    found = {row["image_id"]: row for row in table.to_pylist()}
    assert {name: row["status"] for name, row in found.items()} == {
        "a.png": "ok",
        "a.png?versionId=null": "unreadable",
        "b?c.png": "ok",
    }
    assert found["a.png?versionId=null"]["detail"].endswith("; copy it to another key")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Clients that give up after a second and try nothing by themselves, so that our own tries are seen."""
    import s3fs

    options = {"read_timeout": 1, "connect_timeout": 5, "retries": {"max_attempts": 0}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": options})
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    monkeypatch.setattr(containers, "WAITS_S", (0.02,) * 8)
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", PACKED)
def test_on_s3_that_fails_now_and_then(
    s3: Any, monkeypatch: pytest.MonkeyPatch, expected: dict[str, dict[str, Any]], kind: str
) -> None:
    """500s, 503s, no answer, cut bodies and bodies that are short without saying so, of listing and reading alike."""
    files, name = PACKED[kind]
    upload(s3, files)
    monkeypatch.setattr(reading, "_REQUEST_BYTES", 8_000)  # many requests
    with faulty(FaultyProxy(s3.meta.endpoint_url, share=0.3, chance=random.Random(kind), hang_s=1.2)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        listing = list_archive(open_archive(f"s3://cells-bucket/in/{name}".rstrip("/")))
        read = read_cells(listing, image_size=24)
    found = {row["image_id"]: row for row in read.table.to_pylist()}
    pixels = iter(read.pixels)
    for image_id in listing["image_id"].to_pylist():
        row = found[image_id]
        row["pixels"] = next(pixels).tobytes() if row["status"] == "ok" else None
    assert found == expected
    assert any(proxy.done), "something was spoilt"


@pytest.mark.usefixtures("impatient")
def test_object_that_fails_always_is_unreadable_and_its_neighbours_are_not(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(s3, {"a.png": samples.noise(1), "bad.png": samples.noise(2), "c.png": samples.noise(3)})
    listing = list_archive(open_archive("s3://cells-bucket/in"))
    monkeypatch.setattr(containers, "WAITS_S", (0.02, 0.02))
    with faulty(FaultyProxy(s3.meta.endpoint_url, share=0, chance=random.Random(1), always="bad")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        table = read_cells(listing, image_size=24).table
    assert table["status"].to_pylist() == ["ok", "unreadable", "ok"]
    assert "Service Unavailable" in table["detail"][1].as_py()
