"""The listing: one row per file, in an order and with a digest that only the archive's content decides."""

from __future__ import annotations

import io
import logging
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import samples
from hypothesis import given, settings
from hypothesis import strategies as st

from malaria_ray.archives import open_archive
from malaria_ray.archives.listing import check_same_listing, list_archive, listing_digest, shards, try_again
from malaria_ray.archives.replaced import check_unchanged
from malaria_ray.errors import ArchiveError, PatientMappingError
from malaria_ray.runtime import storage
from malaria_ray.schema import LISTING


class Listed:
    """An archive of given places, in given tables."""

    url = "test://listed"

    def __init__(self, tables: list[list[dict[str, Any]]]):
        self.tables = tables

    def identity(self) -> dict[str, Any]:
        return {"archive": self.url}

    def places(self) -> Iterator[pa.Table]:
        for rows in self.tables:
            schema = pa.schema([("image_id", pa.string()), ("n_bytes", pa.int64()), ("container", pa.string()),
                                ("method", pa.string()), ("offset", pa.int64())])  # fmt: skip
            yield pa.Table.from_pylist(rows, schema=schema)


def place(image_id: str, n_bytes: int = 10, offset: int | None = None) -> dict[str, Any]:
    return {"image_id": image_id, "n_bytes": n_bytes, "container": "/c", "method": "file", "offset": offset}


NAMES = ["Parasitized/C51AP12thinF_1.png", "Uninfected/C1_thinF_1.png", "Uninfected/x.png", "b.png", "a.png"]


def test_every_column_of_the_contract_is_there_in_its_type() -> None:
    listing = list_archive(Listed([[place(name) for name in NAMES]]))
    expected = LISTING.arrow_schema()
    encoded = pa.field("container", pa.dictionary(pa.int32(), pa.string()))
    assert listing.schema.equals(expected.set(expected.get_field_index("container"), encoded), check_metadata=False)
    assert listing.schema.metadata[b"malaria_ray.table"] == b"listing"
    assert listing["key"].to_pylist() == list(range(5))
    assert listing["crc32"].null_count == 5  # this kind knows none


def test_labels_come_from_folders_and_patients_from_names() -> None:
    listing = list_archive(Listed([[place(name) for name in NAMES]]))
    found = {row["image_id"]: (row["label"], row["patient_id"]) for row in listing.to_pylist()}
    assert found == {
        "Parasitized/C51AP12thinF_1.png": (1, "P12"),
        "Uninfected/C1_thinF_1.png": (0, "C1"),
        "Uninfected/x.png": (0, None),
        "a.png": (None, None),
        "b.png": (None, None),
    }


def test_rows_are_ordered_by_container_whatever_order_they_were_found_in() -> None:
    places = [("b", 7), ("b", 3), ("c", 7), ("c", 3), ("a", 7), ("a", 3), ("a", 5)]
    tables = [[{**place(f"{where}{at}", offset=at), "container": f"s3://b/{where}"}] for where, at in places]
    listing = list_archive(Listed(tables))
    assert listing["image_id"].to_pylist() == ["a3", "a5", "a7", "b3", "b7", "c3", "c7"]
    assert listing["container"].to_pylist() == [f"s3://b/{where}" for where in "aaabbcc"]


def test_a_long_signed_address_is_held_once_and_not_in_every_row() -> None:
    address = "https://store/cells.zip?X-Amz-Security-Token=" + "x" * 1500
    rows = [{**place(f"{i:06d}.png", offset=i), "container": address} for i in range(20_000)]
    listing = list_archive(Listed([rows[:10_000], rows[10_000:]]))
    assert listing["container"].to_pylist() == [address] * 20_000
    assert listing["container"].nbytes < 20_000 * 8


@pytest.mark.parametrize(
    ("patients", "pattern", "expected"),
    [
        ({}, None, ["P12", "C1", None]),
        ({"C1_thinF_1.png": "P9"}, None, ["P12", "P9", None]),  # the mapping goes before the name
        ({"x.png": "P7"}, None, ["P12", "C1", "P7"]),  # and takes the file's name in any folder
        ({}, r"^(?P<patient>\w+)/", ["Parasitized", "Uninfected", "Uninfected"]),
        ({"x.png": "P7"}, r"(?P<patient>\d+)thin", ["12", None, "P7"]),
    ],
)
def test_mapping_goes_before_the_rule_for_names(patients, pattern: str | None, expected: list[str | None]) -> None:
    archive = Listed([[place(name) for name in NAMES[:3]]])
    listing = list_archive(archive, patients=patients, pattern=re.compile(pattern) if pattern else None)
    assert listing["patient_id"].to_pylist() == expected


def test_a_mapping_of_another_archive_is_refused_and_one_of_some_files_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    archive = Listed([[place(name) for name in NAMES[:3]]])
    with pytest.raises(PatientMappingError, match="none of the 2 file names .* 'y.png' the first, is in"):
        list_archive(archive, patients={"y.png": "P1", "a/x.png": "P2"})
    logging.getLogger("malaria_ray").propagate = True
    caplog.set_level(logging.INFO, "malaria_ray")
    list_archive(archive, patients={"y.png": "P1", "x.png": "P2"})
    assert "patients of 1 of 3 files by the mapping" in caplog.text


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(12)), cuts=st.sets(st.integers(1, 11)))
def test_rows_and_digest_do_not_depend_on_the_order_of_listing(order: list[int], cuts: set[int]) -> None:
    places = [place(f"{i % 3}/{i}.png", n_bytes=i) for i in range(12)]
    shuffled = [places[i] for i in order]
    bounds = [0, *sorted(cuts), 12]
    tables = [shuffled[a:b] for a, b in pairwise(bounds)]
    expected, found = list_archive(Listed([places])), list_archive(Listed(tables))
    assert found.equals(expected)
    assert listing_digest(found) == listing_digest(expected)


def test_digest_does_not_depend_on_how_the_table_is_held() -> None:
    listing = list_archive(Listed([[place(name) for name in NAMES]]))
    in_pieces = pa.concat_tables([listing.slice(0, 2), listing.slice(2)])
    assert in_pieces["image_id"].num_chunks == 2
    assert listing_digest(in_pieces) == listing_digest(listing)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: [*rows, place("new.png")],
        lambda rows: rows[:-1],
        lambda rows: [*rows[:-1], place("a.png", n_bytes=11)],
        lambda rows: [*rows[:-1], place("A.png")],
        lambda rows: [place(row["image_id"].replace("Uninfected", "Parasitized")) for row in rows],
    ],
    ids=["one more", "one less", "another size", "another name", "another label"],
)
def test_digest_changes_with_the_archive(change) -> None:
    rows = [place(name) for name in NAMES]
    before = listing_digest(list_archive(Listed([rows])))
    assert listing_digest(list_archive(Listed([change(rows)]))) != before


def test_digest_changes_with_the_patients() -> None:
    archive = Listed([[place(name) for name in NAMES]])
    digests = {listing_digest(list_archive(archive, patients=patients)) for patients in ({}, {"x.png": "P1"})}
    assert len(digests) == 2


def test_members_stand_in_the_order_of_their_bytes() -> None:
    """So that neighbours are read by one request."""
    listing = list_archive(Listed([[place("c", offset=0), place("a", offset=900), place("b", offset=100)]]))
    assert listing["image_id"].to_pylist() == ["c", "b", "a"]


def test_empty_tables_between_are_no_matter() -> None:
    assert list_archive(Listed([[], [place("a")], []])).num_rows == 1


def test_nothing_listed_is_an_error() -> None:
    for tables in ([], [[]]):
        with pytest.raises(ArchiveError, match="test://listed holds no files"):
            list_archive(Listed(tables))


def test_names_more_than_once_are_counted_and_the_first_is_named() -> None:
    rows = [place("b"), place("a"), place("b"), place("c"), place("c"), place("c")]
    with pytest.raises(ArchiveError, match="holds 2 names more than once, 'b' the first"):
        list_archive(Listed([rows]))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), n_rows=st.integers(1, 45))
def test_shards_are_the_listing_cut_in_pieces(n: int, n_rows: int) -> None:
    listing = list_archive(Listed([[place(f"{i}.png") for i in range(n)]]))
    pieces = list(shards(listing, n_rows))
    assert pa.concat_tables(pieces).equals(listing)
    assert all(piece.num_rows == n_rows for piece in pieces[:-1])
    assert 0 < pieces[-1].num_rows <= n_rows


def test_folder_and_zip_of_the_same_files_have_the_same_digest(tmp_path: Path) -> None:
    files = {f"Parasitized/C{i}P{i}thin_{i}.png": samples.noise(i) for i in range(5)}
    for name, data in files.items():
        (tmp_path / "cells" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cells" / name).write_bytes(data)
    (tmp_path / "cells.zip").write_bytes(samples.zip_of(files))
    folder, zipped = (list_archive(open_archive(str(tmp_path / name))) for name in ("cells", "cells.zip"))
    assert listing_digest(folder) == listing_digest(zipped)


@pytest.mark.parametrize("kind", ["parquet", "zip"])
def test_other_images_of_the_same_names_are_another_archive(tmp_path: Path, kind: str) -> None:
    """A resumed output would hold old and new images side by side."""
    work, archive = storage.locate(str(tmp_path / "work")), tmp_path / f"cells.{kind}"

    def write(images: list[bytes]) -> None:
        if kind == "zip":
            archive.write_bytes(samples.zip_of(dict(zip(NAMES, images, strict=True)), zipfile.ZIP_STORED))
        else:
            pq.write_table(pa.table({"image_id": NAMES, "image": images}), archive)

    write([bytes([i]) * 50 for i in range(len(NAMES))])
    for _ in range(2):
        check_same_listing(work, list_archive(open_archive(str(archive))))
    write([bytes(range(i, i + 50)) for i in range(len(NAMES))])
    with pytest.raises(ArchiveError, match="the archive changed since the output was begun"):
        check_same_listing(work, list_archive(open_archive(str(archive))))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "b.png").unlink(), "3 files then, 2 now, 'b.png' is gone; --overwrite begins again"),
        (lambda folder: (folder / "d.png").write_bytes(b"1"), "3 files then, 4 now, 'd.png' is new;"),
        (lambda folder: (folder / "b.png").write_bytes(b"12"), "3 files then, 3 now, 'b.png' has another size,"),
    ],
)
def test_where_other_files_changed_than_those_tried_again_one_is_named(
    tmp_path: Path, change: Callable[[Path], object], said: str
) -> None:
    folder, work = tmp_path / "cells", storage.locate(str(tmp_path / "work"))
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (folder / name).write_bytes(b"1")
    was = list_archive(open_archive(str(folder)))
    (folder / "a.png").write_bytes(b"123")  # it may
    change(folder)
    with pytest.raises(ArchiveError, match=said):
        try_again(work, pa.chunked_array([["a.png"]]), was=was, now=list_archive(open_archive(str(folder))))


def packed_as(kind: str, names: list[str]) -> bytes:
    """The images in this order, all of one size, so that only their order tells one file from the other."""
    images = {name: samples.noise(i) for i, name in enumerate(sorted(names))}
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in names:
                archive.writestr(name, images[name])
    elif kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(images[name])
                archive.addfile(info, io.BytesIO(images[name]))
    else:
        pq.write_table(pa.table({"image_id": names, "image": [images[name] for name in names]}), buffer)
    return buffer.getvalue()


def read_while(change: Callable[[], object], url: str, *, work: Path) -> None:
    archive = open_archive(url)
    listing = list_archive(archive)
    change()
    check_unchanged(storage.locate(str(work)), archive, listing)


@pytest.mark.parametrize("kind", ["zip", "tar", "parquet"])
def test_an_archive_that_is_replaced_while_it_is_read_is_found(tmp_path: Path, s3: Any, kind: str) -> None:
    on_disk, names = tmp_path / f"cells.{kind}", [f"{i}.png" for i in range(8)]
    on_disk.write_bytes(packed_as(kind, names))
    read_while(on_disk.read_bytes, str(on_disk), work=tmp_path)
    with pytest.raises(ArchiveError, match=f"{on_disk} was replaced while it was read; run again"):
        read_while(lambda: on_disk.write_bytes(packed_as(kind, names[::-1])), str(on_disk), work=tmp_path)

    def put(order: list[str]) -> None:
        s3.put_object(Bucket="cells-bucket", Key=f"shards/1.{kind}", Body=packed_as(kind, order))

    put(names)
    url = f"s3://cells-bucket/shards/1.{kind}" if kind == "zip" else "s3://cells-bucket/shards"
    read_while(lambda: None, url, work=tmp_path)
    with pytest.raises(ArchiveError, match=f"1.{kind} was replaced while it was read"):
        read_while(lambda: put(names[::-1]), url, work=tmp_path)
    with pytest.raises(ArchiveError, match=f"1.{kind} cannot be looked at: .*; check that it is still there"):
        read_while(lambda: s3.delete_object(Bucket="cells-bucket", Key=f"shards/1.{kind}"), url, work=tmp_path)


def test_a_file_of_a_folder_may_be_replaced_for_it_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(samples.noise(1))
    read_while(lambda: (tmp_path / "a.png").write_bytes(samples.noise(2)), str(tmp_path), work=tmp_path)
