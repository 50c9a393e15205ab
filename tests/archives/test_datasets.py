"""A dataset as an archive: listed without its pixels, read by the row groups that are asked for."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from malaria_ray.archives import containers, open_archive
from malaria_ray.archives.listing import list_archive
from malaria_ray.archives.reading import read_cells
from malaria_ray.cells.crops import crops_column
from malaria_ray.errors import DirectoryError
from malaria_ray.runtime import outputs, storage
from malaria_ray.schema import MANIFEST, crops_table

SIZE, N, PER_PART, PER_GROUP = 125, 24, 12, 4
FOOTER_BYTES = 64 * 1024  # pyarrow reads so much of a file's end at once
PIXELS = np.random.default_rng([9]).integers(0, 256, (N, SIZE, SIZE, 3), np.uint8)


@dataclass(frozen=True)
class Config:
    image_size: int = SIZE


def dataset_at(url: str) -> str:
    """A finished dataset of random crops in two parts of three row groups each, as ingest lays it out."""
    path = storage.locate(url)
    with outputs.one_writer():
        outputs.claim(path, stage="ingest", config=Config(), identity={"image_size": SIZE}, overwrite=False).begin()
    known = {
        "image_id": [f"{i:02d}.png" for i in range(N)],
        "label": [i % 2 for i in range(N)],
        "patient_id": [f"P{i // 4}" for i in range(N)],
        "n_bytes": [1000 + i for i in range(N)],
    }
    rows = pa.table({field.name: known.get(field.name, pa.nulls(N, field.type)) for field in MANIFEST.arrow_schema()})
    rows = rows.take(np.random.default_rng([1]).permutation(N))
    files = {"manifest.parquet": storage.write_table(path / "manifest.parquet", rows)}
    schema = crops_table(SIZE).arrow_schema()
    columns = {field.name: known.get(field.name, pa.nulls(N, field.type)) for field in schema}
    crops = pa.table(columns | {"image": crops_column(PIXELS)})
    for part in range(N // PER_PART):
        piece = crops.slice(part * PER_PART, PER_PART).cast(schema)
        name = f"crops/{storage.part_name(part)}"
        files[name] = storage.write_table(path / name, piece, row_group_rows=PER_GROUP)
    outputs.finish(path, counts={}, files=files, timings={}, dataset_digest="0" * 16)
    return url


@pytest.fixture(params=["disk", "memory"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield dataset_at(str(tmp_path / "dataset"))
    else:
        yield dataset_at("memory://test_datasets")
        fsspec.filesystem("memory").rm("/test_datasets", recursive=True)


class Counted(io.BytesIO):
    n_read = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        Counted.n_read += len(data)
        return data


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    """Counts the bytes that are read of opened files."""
    opened = containers.open_file

    def open_file(path, *, is_read_in_order: bool) -> Counted:
        with opened(path, is_read_in_order=is_read_in_order) as file:
            return Counted(file.read())

    monkeypatch.setattr(containers, "open_file", open_file)
    monkeypatch.setattr(Counted, "n_read", 0)
    return Counted


def test_listing_knows_each_crop_and_reads_no_pixels(dataset: str, counted: type[Counted]) -> None:
    listing = list_archive(open_archive(dataset))
    assert listing["image_id"].to_pylist() == [f"{i:02d}.png" for i in range(N)]
    assert listing["n_bytes"].to_pylist() == [1000 + i for i in range(N)]
    assert listing["label"].to_pylist() == [0, 1] * (N // 2)
    assert listing["patient_id"].to_pylist() == [f"P{i // 4}" for i in range(N)]
    assert listing["offset"].to_pylist() == [*range(PER_PART)] * 2
    assert 0 < counted.n_read < PIXELS.nbytes / 4


@pytest.mark.parametrize(
    "rows", [[0], [4, 5], [3, 4], [0, 11], [2, 9, 10], [11, 12], [23], [*range(N)], [10, 1, 1, 5]], ids=str
)
def test_rows_are_read_from_their_row_groups(dataset: str, rows: list[int]) -> None:
    listing = list_archive(open_archive(dataset)).take(rows)
    read = read_cells(listing, image_size=SIZE)
    np.testing.assert_array_equal(read.pixels, PIXELS[rows])
    assert read.table["image_id"].to_pylist() == [f"{i:02d}.png" for i in rows]
    assert read.table["n_bytes"].to_pylist() == [1000 + i for i in rows]


def test_other_row_groups_are_not_read(dataset: str, counted: type[Counted]) -> None:
    listing = list_archive(open_archive(dataset)).slice(5, 2)
    counted.n_read = 0
    np.testing.assert_array_equal(read_cells(listing, image_size=SIZE).pixels, PIXELS[5:7])
    group = PIXELS[:PER_GROUP].nbytes
    assert group <= counted.n_read < group + 2 * FOOTER_BYTES < 2 * group


def test_part_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray, ArrowPythonObjectType

    path = storage.locate(dataset_at(str(tmp_path / "dataset"))) / "crops" / storage.part_name(0)
    rows = storage.read_table(path)
    pickled = pa.array([b"x"] * rows.num_rows, pa.large_binary())
    column = ArrowPythonObjectArray.from_storage(ArrowPythonObjectType(), pickled)
    storage.write_table(path, rows.set_column(rows.schema.get_field_index("patient_id"), "patient_id", column))
    with pytest.raises(DirectoryError, match="no plain table"):
        list_archive(open_archive(str(tmp_path / "dataset")))


@pytest.mark.parametrize("fault", ["damaged", "gone"])
def test_a_part_that_cannot_be_read_costs_its_own_rows(
    dataset: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "WAITS_S", (0.0,))
    listing = list_archive(open_archive(dataset))
    part = storage.locate(dataset) / "crops" / storage.part_name(1)
    if fault == "gone":
        storage.remove(part)
    else:
        data = bytearray(part.read_bytes())
        data[1000:2000] = bytes(1000)
        storage.write_bytes(part, bytes(data))
    cells = read_cells(listing, image_size=SIZE)
    rows = cells.table.to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * PER_PART + ["unreadable"] * PER_PART
    assert [row["image_id"] for row in rows] == listing["image_id"].to_pylist()
    assert [row["n_bytes"] for row in rows] == listing["n_bytes"].to_pylist()
    assert all(row["detail"] and row["width"] is None and row["content_digest"] is None for row in rows[PER_PART:])
    np.testing.assert_array_equal(cells.pixels, PIXELS[:PER_PART])
    assert cells.table.schema.equals(read_cells(listing.slice(0, 3), image_size=SIZE).table.schema)
    only = read_cells(listing.slice(PER_PART), image_size=SIZE)
    assert only.pixels.shape == (0, SIZE, SIZE, 3)
    assert only.table.schema.equals(cells.table.schema)


def test_a_dataset_that_was_made_anew_since_it_was_opened_is_not_listed(dataset: str) -> None:
    archive = open_archive(dataset)
    manifest = storage.locate(dataset) / "manifest.parquet"
    storage.write_table(manifest, storage.read_table(manifest).slice(1))
    with pytest.raises(DirectoryError, match=r"manifest.parquet is not the file that was written"):
        list_archive(archive)
