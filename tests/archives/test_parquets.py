"""Parquet files of encoded images, in the layouts that people have."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import samples
from servers import Site, serve

from malaria_ray.archives import containers, open_archive, parquets
from malaria_ray.archives.listing import list_archive
from malaria_ray.archives.reading import read_cells, read_files
from malaria_ray.errors import ArchiveError, ReadError

N = 7
IMAGES = [samples.noise(i) for i in range(N)]
NAMES = [f"C{i}_thinF_{i}.png" for i in range(N)]


NO_FOOTER = b"PAR1" + bytes(64) + b"\x40\x00\x00\x00PAR1"
"""A footer that is no Thrift."""


def hugging_face(names: list[str]) -> pa.Table:
    """As `datasets` writes an image column and a ClassLabel."""
    images = pa.array([{"bytes": data, "path": name} for data, name in zip(IMAGES, NAMES, strict=True)])
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    table = pa.table({"image": images, "label": pa.array([0, 1, 0, 1, 0, 1, None], pa.int64())})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def listed(path: Path) -> list[dict[str, Any]]:
    return list_archive(open_archive(str(path))).to_pylist()


LAYOUTS = {
    "image": (pa.table({"image_id": NAMES, "image": IMAGES}), NAMES),
    "bytes and path": (pa.table({"path": NAMES, "bytes": IMAGES}), NAMES),
    "large": (pa.table({"file_name": NAMES, "image": pa.array(IMAGES, pa.large_binary())}), NAMES),
    "hugging face": (hugging_face(["Uninfected", "Parasitized"]), NAMES),
    "no names": (pa.table({"image": IMAGES}), [f"cells/{i:08d}" for i in range(N)]),
    "names of a category": (pa.table({"image_id": pa.array(NAMES).dictionary_encode(), "image": IMAGES}), NAMES),
    "some names": (
        pa.table({"image_id": [*NAMES[:-1], None], "image": IMAGES}),
        [*NAMES[:-1], "cells/00000006"],
    ),
}


@pytest.mark.parametrize("row_group", [1, 3, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bytes(tmp_path: Path, layout: str, row_group: int) -> None:
    table, names = LAYOUTS[layout]
    pq.write_table(table, tmp_path / "cells.parquet", row_group_size=row_group)
    listing = list_archive(open_archive(str(tmp_path / "cells.parquet")))
    assert listing["image_id"].to_pylist() == names
    assert list(read_files(listing)) == IMAGES
    order = np.random.default_rng([3]).permutation(N)
    assert list(read_files(listing.take(order))) == [IMAGES[i] for i in order]
    assert list(read_files(listing.slice(2, 2))) == IMAGES[2:4]


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (None, ["Uninfected", "Parasitized"], [0, 1, 0, 1, 0, 1, None]),
        (None, ["Parasitized", "Uninfected"], [1, 0, 1, 0, 1, 0, None]),  # as ImageFolder numbers them: names decide
        (pa.array([0, 1, -1, None, 0, 1, 1]), None, [0, 1, None, None, 0, 1, 1]),
        (pa.array(["Parasitized", "uninfected", "", None, "1", "0", "1"]), None, [1, 0, None, None, 1, 0, 1]),
    ],
)
def test_labels(tmp_path: Path, labels: Any, names: list[str] | None, expected: list[int | None]) -> None:
    table = hugging_face(names) if names else pa.table({"image_id": NAMES, "image": IMAGES, "label": labels})
    pq.write_table(table, tmp_path / "cells.parquet")
    assert [row["label"] for row in listed(tmp_path / "cells.parquet")] == expected


def test_patients_are_taken_and_else_come_from_names(tmp_path: Path) -> None:
    patients = ["P9", None, *["P1"] * 5]
    table = pa.table({"image_id": NAMES, "image": IMAGES, "patient_id": patients})
    pq.write_table(table, tmp_path / "cells.parquet")
    assert [row["patient_id"] for row in listed(tmp_path / "cells.parquet")] == ["P9", "C1", *["P1"] * 5]


def test_folder_of_files_is_one_archive_and_other_tables_are_rows_in_quarantine(tmp_path: Path) -> None:
    for part in range(2):
        table = pa.table({"image_id": NAMES[part::2], "image": IMAGES[part::2]})
        pq.write_table(table, tmp_path / f"train-{part}.parquet")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "metadata.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"no Parquet")
    (tmp_path / "footer.parquet").write_bytes(NO_FOOTER)
    (tmp_path / "train-1.parquet").rename(tmp_path / "train-1.PARQUET")
    (tmp_path / "README.md").write_text("cells")
    table = read_cells(list_archive(open_archive(str(tmp_path))), image_size=16).table
    found = dict(zip(table["image_id"].to_pylist(), table["status"].to_pylist(), strict=True))
    others = dict.fromkeys(["metadata.parquet", "broken.parquet", "footer.parquet", "README.md"], "not_an_image")
    assert found == dict.fromkeys(NAMES, "ok") | others
    sizes = dict(zip(table["image_id"].to_pylist(), table["n_bytes"].to_pylist(), strict=True))
    assert [sizes[name] for name in NAMES] == [len(data) for data in IMAGES]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (pa.table({"x": [1]}), "has no column of encoded images: found x; allowed are a column 'image' or 'bytes'"),
        (pa.table({"image": pa.array([bytes(12)], pa.binary(12))}), "crops of a dataset: give the dataset's directory"),
        (pa.table({"image": IMAGES, "label": [2] * N}), "column label holds the label 2; allowed are 0 or uninfected"),
    ],
)
def test_what_cannot_be_an_archive_is_refused(tmp_path: Path, table: pa.Table, said: str) -> None:
    pq.write_table(table, tmp_path / "cells.parquet")
    with pytest.raises(ArchiveError, match=said):
        listed(tmp_path / "cells.parquet")


def test_broken_file_is_refused_in_one_line(tmp_path: Path) -> None:
    for content in (b"PAR1 no Parquet", NO_FOOTER):
        (tmp_path / "cells.parquet").write_bytes(content)
        with pytest.raises(ArchiveError, match="is no complete Parquet file"):
            listed(tmp_path / "cells.parquet")


def test_signature_of_a_url_is_in_no_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": IMAGES}), tmp_path / "cells.parquet")
    with serve(Site({"/cells.parquet": (tmp_path / "cells.parquet").read_bytes()})) as site:
        listing = list_archive(open_archive(f"{site.url}/cells.parquet?X-Amz-Signature=SECRET"))
        assert listing["image_id"].to_pylist() == [f"cells/{i:08d}" for i in range(N)]
        assert list(read_files(listing)) == IMAGES


def test_row_without_bytes_is_a_row_with_its_reason(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [IMAGES[0], None, b"", IMAGES[1]]}), tmp_path / "cells.parquet")
    table = read_cells(list_archive(open_archive(str(tmp_path / "cells.parquet"))), image_size=16).table
    assert table["status"].to_pylist() == ["ok", "unreadable", "empty_file", "ok"]


def test_damaged_row_group_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "WAITS_S", (0.0,))
    file = tmp_path / "cells.parquet"
    pq.write_table(pa.table({"image": IMAGES}), file, row_group_size=2, compression="zstd", use_dictionary=False)
    listing = list_archive(open_archive(str(file)))
    column = pq.read_metadata(file).row_group(1).column(0)
    data = bytearray(file.read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(data)
    found = list(read_files(listing))
    assert [isinstance(item, ReadError) for item in found] == [False, False, True, True, False, False, False]
    assert found[4:] == IMAGES[4:]


def test_rows_before_a_damaged_page_are_read_whatever_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "WAITS_S", (0.0,))
    images = [np.random.default_rng([i]).bytes(1000) for i in range(4096)]
    file = tmp_path / "cells.parquet"
    options = {"compression": "none", "use_dictionary": False, "data_page_size": 2**18}
    pq.write_table(pa.table({"image": images}), file, row_group_size=4096, **options)
    listing = list_archive(open_archive(str(file)))
    data = bytearray(file.read_bytes())
    header = data.rindex(b"\x15\x00\x15", 0, data.index(images[2000]))
    data[header : header + 16] = bytes(16)
    file.write_bytes(data)
    found = {}
    for n in (4096, 1024, 100):
        parquets._kept.clear()
        read = [item for start in range(0, 4096, n) for item in read_files(listing.slice(start, n))]
        found[n] = [isinstance(item, ReadError) for item in read]
        assert all(item == image for item, image in zip(read, images, strict=True) if isinstance(item, bytes))
    assert found[4096] == found[1024] == found[100]
    assert 1000 < found[100].index(True) <= 2000


@pytest.mark.parametrize("is_struct", [True, False])
def test_rows_of_large_images_are_read_a_few_at_a_time(tmp_path: Path, is_struct: bool) -> None:
    """In one array 128 of them would pass the 2 GiB of Arrow's offsets, and the memory of an actor before that."""
    images = [bytes([i]) * 18_000_000 for i in range(20)]
    column = [{"bytes": data, "path": f"{i}.bmp"} for i, data in enumerate(images)] if is_struct else images
    options = {"row_group_size": 20, "use_dictionary": False, "compression": "zstd", "write_batch_size": 1}
    pq.write_table(pa.table({"image": column}), tmp_path / "cells.parquet", **options)
    listing = list_archive(open_archive(str(tmp_path / "cells.parquet")))
    was, counted = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(counted)
    try:
        assert [len(data) for data in read_files(listing.slice(10, 2))] == [18_000_000] * 2
    finally:
        parquets._kept.clear()
        pa.set_memory_pool(was)
    assert counted.max_memory() < 200 * 2**20


def test_file_gone_after_it_was_listed_gives_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": IMAGES}), tmp_path / "cells.parquet")
    listing = list_archive(open_archive(str(tmp_path / "cells.parquet")))
    (tmp_path / "cells.parquet").unlink()
    assert read_cells(listing, image_size=16).table["status"].to_pylist() == ["unreadable"] * N


def test_a_large_row_group_is_read_page_by_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquets, "_BUFFER_BYTES", 64 * 1024)
    chance = np.random.default_rng([1])
    table = pa.table({"image": [chance.bytes(100_000) for _ in range(600)]})  # 60 MB
    pq.write_table(table, tmp_path / "cells.parquet", use_dictionary=False, compression="none", write_batch_size=8)
    listing = list_archive(open_archive(str(tmp_path / "cells.parquet")))
    was, counted = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(counted)
    try:
        assert [len(data) for data in read_files(listing.slice(590, 2))] == [100_000, 100_000]
    finally:
        parquets._kept.clear()  # what it has read lies in the pool that goes
        pa.set_memory_pool(was)
    assert counted.max_memory() < 30 * 2**20


def test_a_large_row_group_is_read_once_by_blocks_that_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from its beginning for each of them: of a million rows in one group that would be terabytes."""
    n, images = 4000, [np.random.default_rng([i]).bytes(3000) for i in range(4000)]
    path, other = tmp_path / "cells.parquet", tmp_path / "other.parquet"
    pq.write_table(pa.table({"image": images}), path, row_group_size=n, compression="none")
    pq.write_table(pa.table({"image": images[::-1]}), other, row_group_size=n)
    n_read = []

    class Counting(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            n_read.append(len(buffer))
            return super().readinto(buffer)

        def read(self, size: int | None = -1) -> bytes:
            n_read.append(size or 0)
            return super().read(size)

    monkeypatch.setattr(containers, "open_file", lambda path, **_: Counting(path.path))
    monkeypatch.setattr(parquets, "_BUFFER_BYTES", 100_000)
    listing = list_archive(open_archive(str(path)))
    n_read.clear()
    for start in range(0, n, 250):
        assert list(read_files(listing.slice(start, 250))) == images[start : start + 250]
    assert path.stat().st_size < sum(n_read) < 2 * path.stat().st_size
    of_other = list_archive(open_archive(str(other)))
    for start in (3000, 500, 1000):  # back and forth, between two files
        assert list(read_files(listing.slice(start, 10))) == images[start : start + 10]
        assert list(read_files(of_other.slice(start, 10))) == images[::-1][start : start + 10]
    pq.write_table(pa.table({"image": images[::-1]}), path, row_group_size=n)  # another file of that name
    assert list(read_files(listing.slice(1010, 10))) == images[::-1][1010:1020]
