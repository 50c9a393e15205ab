"""What is in an archive, as one table ordered by where it lies, and the shards that tasks take from it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from malaria_ray.archives import Archive
from malaria_ray.cells.patients import label_of, patient_of
from malaria_ray.errors import ArchiveError
from malaria_ray.runtime import storage
from malaria_ray.schema import LISTING


def list_archive(
    archive: Archive,
    *,
    patients: Mapping[str, str | None] | None = None,
    pattern: re.Pattern[str] | None = None,
) -> pa.Table:
    """All files of an archive as a `schema.LISTING` table, ordered by place; `key` is the row number.

    `patients` maps file names to patients and goes before the rule for names (`cells.patients.patient_of`).
    Raises: `ArchiveError` where the archive is empty or has one name twice.
    """
    tables = [_complete(places, patients or {}, pattern) for places in archive.places() if places.num_rows]
    if not tables:
        raise ArchiveError(f"{archive.url} holds no files; give an archive with images in it")
    listing = pa.concat_tables(tables).combine_chunks()
    listing = listing.sort_by([("container", "ascending"), ("offset", "ascending"), ("image_id", "ascending")])
    _check_unique(listing, archive.url)
    return listing.set_column(0, "key", pa.array(np.arange(listing.num_rows)))


def listing_digest(listing: pa.Table) -> str:
    """First 16 hex digits of a SHA-256 over names, sizes, labels and patients: the same archive gives the same
    digest.
    """
    digest = hashlib.sha256()
    for name in ("image_id", "n_bytes", "label", "patient_id"):
        column = pc.fill_null(pc.cast(listing[name], pa.string()), "\x00")
        for chunk in column.chunks:
            digest.update("".join(f"{text}\x01" for text in chunk.to_pylist()).encode())
        digest.update(b"\x02")
    return digest.hexdigest()[:16]


def check_same_listing(work: UPath, listing: pa.Table) -> None:
    """Keeps the listing's digest in the work folder of an output; a resumed run must find the archive that the first
    one found.

    Raises: `ArchiveError` where it differs.
    """
    file, now = work / "listing.json", {"n_files": listing.num_rows, "digest": listing_digest(listing)}
    if not file.exists():
        storage.write_json(file, now)
    elif (was := storage.read_json(file)) != now:
        raise ArchiveError(
            f"the archive changed since the output was begun: {was['n_files']:,} files then, {now['n_files']:,} now, "
            f"or others; "
            "--overwrite begins again"
        )


def shards(listing: pa.Table, n_rows: int) -> Iterator[pa.Table]:
    """Consecutive pieces of at most `n_rows` rows."""
    for start in range(0, listing.num_rows, n_rows):
        yield listing.slice(start, n_rows)


def _complete(places: pa.Table, patients: Mapping[str, str | None], pattern: re.Pattern[str] | None) -> pa.Table:
    """Adds the columns that the kind of archive does not know."""
    image_ids: list[str] = places["image_id"].to_pylist()
    columns = {}
    for column in LISTING.columns:
        if column.name in places.column_names:
            columns[column.name] = places[column.name].cast(column.type)
        elif column.name == "label":
            columns["label"] = pa.array([label_of(image_id) for image_id in image_ids], pa.int8())
        elif column.name == "patient_id":
            known = (patients.get(image_id.rpartition("/")[2]) for image_id in image_ids)
            columns["patient_id"] = pa.array(
                [patient or patient_of(image_id, pattern) for patient, image_id in zip(known, image_ids, strict=True)],
                pa.string(),
            )
        else:
            columns[column.name] = pa.nulls(len(image_ids), column.type)
    return pa.table(columns, schema=LISTING.arrow_schema())


def _check_unique(listing: pa.Table, url: str) -> None:
    counts = pc.value_counts(listing["image_id"].combine_chunks())
    doubled = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(doubled):
        name = doubled.field("values")[0].as_py()
        raise ArchiveError(
            f"{url} holds {len(doubled)} names more than once, {name!r} the first; a name must be unique: pack the "
            f"archive anew"
        )
