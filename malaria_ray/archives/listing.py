"""What is in an archive, as one table ordered by where it lies, and the shards that tasks take from it."""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from malaria_ray.archives import Archive
from malaria_ray.archives.datasets import DatasetArchive
from malaria_ray.cells.patients import file_names, labels_of, patients_of
from malaria_ray.errors import ArchiveError, PatientMappingError
from malaria_ray.runtime import storage
from malaria_ray.schema import LISTING

log = logging.getLogger("malaria_ray")

_BATCH_ROWS = 100_000  # at a time, where columns are computed
_SCHEMA = LISTING.arrow_schema().set(
    LISTING.names.index("container"), pa.field("container", pa.dictionary(pa.int32(), pa.string()))
)
_KEPT = "listing.json"


def list_archive(
    archive: Archive,
    *,
    patients: Mapping[str, str] | None = None,
    pattern: re.Pattern[str] | None = None,
) -> pa.Table:
    """All files of an archive as a `schema.LISTING` table, ordered by place; `key` is the row number. Its `container`
    is a dictionary, so that a signed URL of 1,500 letters is held once and not a million times.

    A patient is what `patients` (file names → patients) says, else what `pattern` finds in the path, else what the
    archive itself holds beside the image, else the rule for names (`cells.patients.patient_of`). A label is what the
    archive holds, else the folder's. A dataset knows both for certain. Only bounded pieces of the listing are ever
    Python objects: a million files are some 300 MB (ARCHITECTURE.md).
    Raises: `ArchiveError` where the archive is empty, has one name twice or contradicts itself about a label,
    `PatientMappingError` where `patients` names none of its files.
    """
    known = _mapping(patients or {})
    is_certain = isinstance(archive, DatasetArchive)
    tables = []
    for places in archive.places():
        for start in range(0, places.num_rows, _BATCH_ROWS):
            tables.append(_complete(places.slice(start, _BATCH_ROWS), known, pattern, is_certain))
    if not tables:
        raise ArchiveError(f"{archive.url} holds no files; give an archive with images in it")
    listing = pa.concat_tables(tables)
    tables.clear()
    if (order := _order(listing)) is not None:
        for at, field in enumerate(listing.schema):  # one by one: only one column is there twice
            listing = listing.set_column(at, field, listing[field.name].take(order))
    _check_unique(listing, archive.url)
    if patients and not is_certain:
        _check_named(listing, known[0], archive.url)
    return listing.set_column(0, "key", pa.array(np.arange(listing.num_rows)))


def listing_digest(listing: pa.Table) -> str:
    """First 16 hex digits of a SHA-256 over names, sizes, labels and patients: the same archive gives the same
    digest.
    """
    return _digest(listing, ("image_id", "n_bytes", "label", "patient_id"))


def check_same_listing(work: UPath, listing: pa.Table) -> None:
    """Keeps the listing's digest in the work folder of an output; a resumed run must find the archive that the first
    one found, but for the files that it shall try again.

    Raises: `ArchiveError` where it differs.
    """
    file = work / _KEPT
    if not file.exists():
        storage.write_json(file, _facts(listing))
        return
    was = storage.read_json(file)
    retried = storage.read_table(work / was["retried"])["image_id"] if "retried" in was else None
    _check_same(was, _facts(listing, retried))


def try_again(work: UPath, retried: pa.ChunkedArray, *, was: pa.Table, now: pa.Table) -> None:
    """Lets the files of these names have changed since the listing was kept: they may have been mended meanwhile.

    Raises: `ArchiveError` where others have; then nothing is changed.
    """
    if (work / _KEPT).exists() and (earlier := storage.read_json(work / _KEPT).get("retried")):
        names = storage.read_table(work / earlier)["image_id"]
        retried = pa.chunked_array([pc.unique(pa.chunked_array([*names.chunks, *retried.chunks]))])
    kept = _facts(was, retried)
    _check_same(kept, _facts(now, retried), lambda: _first_difference(was, now, retried))
    name = f"retried-{secrets.token_hex(8)}.parquet"  # a new one, so that the old notes hold until they are replaced
    storage.write_table(work / name, pa.table({"image_id": retried}))
    storage.write_json(work / _KEPT, {**kept, "retried": name})


def _facts(listing: pa.Table, retried: pa.ChunkedArray | None = None) -> dict[str, Any]:
    """What must stay as it is. Of a zip its checksums tell content, of a Parquet file the mean size of its images; a
    container with a mended file has others.
    """
    if retried is None:
        content = {"content": _digest(listing, ("packed_bytes", "crc32"))}
    else:
        may_change = pc.is_in(listing["image_id"], value_set=retried.combine_chunks())
        sizes = pc.if_else(may_change, None, listing["n_bytes"])
        listing = listing.set_column(listing.schema.get_field_index("n_bytes"), "n_bytes", sizes)
        content = {}
    return {"n_files": listing.num_rows, "digest": listing_digest(listing), **content}


def _check_same(was: dict[str, Any], now: dict[str, Any], first: Callable[[], str] = lambda: "or others") -> None:
    if any(was[name] != value for name, value in now.items() if name in was):
        raise ArchiveError(
            f"the archive changed since the output was begun: {was['n_files']:,} files then, {now['n_files']:,} now, "
            f"{first()}; --overwrite begins again"
        )


def _first_difference(was: pa.Table, now: pa.Table, retried: pa.ChunkedArray) -> str:
    """What is different, by the name of one file."""
    for one, other, what in ((was, now, "gone"), (now, was, "new")):
        is_missing = pc.invert(pc.is_in(one["image_id"], value_set=other["image_id"].combine_chunks()))
        if pc.any(is_missing).as_py():
            return f"{one['image_id'].filter(is_missing)[0].as_py()!r} is {what}"
    before, after = (
        table.filter(pc.invert(pc.is_in(table["image_id"], value_set=retried.combine_chunks())))
        .select(["image_id", "n_bytes", "label", "patient_id"])
        .to_pandas()
        .set_index("image_id")
        for table in (was, now)
    )
    others = before.compare(after.loc[before.index]).index
    return f"{others[0]!r} has another size, label or patient" if len(others) else "or others"


def _digest(listing: pa.Table, columns: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in columns:
        for start in range(0, listing.num_rows, _BATCH_ROWS):
            column = listing[name].slice(start, _BATCH_ROWS).cast(pa.large_string()).combine_chunks()
            empty, end = (pa.scalar(text, pa.large_string()) for text in ("", "\x01"))
            ended = pc.binary_join_element_wise(pc.fill_null(column, "\x00"), empty, end)
            for chunk in ended.chunks if isinstance(ended, pa.ChunkedArray) else [ended]:
                digest.update(chunk.buffers()[2] or b"")
        digest.update(b"\x02")
    return digest.hexdigest()[:16]


def shards(listing: pa.Table, n_rows: int) -> Iterator[pa.Table]:
    """Consecutive pieces of at most `n_rows` rows."""
    for start in range(0, listing.num_rows, n_rows):
        yield listing.slice(start, n_rows)


def _mapping(patients: Mapping[str, str]) -> tuple[pa.Array, pa.Array]:
    return pa.array(list(patients), pa.string()), pa.array(list(patients.values()), pa.string())


def _complete(
    places: pa.Table, known: tuple[pa.Array, pa.Array], pattern: re.Pattern[str] | None, is_certain: bool
) -> pa.Table:
    """Adds the columns that the kind of archive does not know."""
    image_ids = places["image_id"].combine_chunks()
    columns = {}
    for column in _SCHEMA:
        given = places[column.name].cast(column.type) if column.name in places.column_names else None
        if given is not None and (is_certain or column.name not in ("label", "patient_id")):
            columns[column.name] = given
        elif column.name == "label":
            columns["label"] = _labels(image_ids, given)
        elif column.name == "patient_id":
            of_file = known[1].take(pc.index_in(file_names(image_ids), value_set=known[0]))
            candidates = [of_file, *([patients_of(image_ids, pattern)] if pattern else [])]
            candidates += [given] if given is not None else []
            candidates += [] if pattern else [patients_of(image_ids)]
            columns["patient_id"] = pc.coalesce(*candidates)
        else:
            columns[column.name] = pa.nulls(len(image_ids), column.type)
    return pa.table(columns, schema=_SCHEMA)


def _labels(image_ids: pa.Array, given: pa.ChunkedArray | None) -> pa.Array | pa.ChunkedArray:
    """The archive's labels, else the folders'. Raises: `ArchiveError` where the two contradict each other: then numbers
    stand for other classes than here, and every metric would be upside down.
    """
    of_folder = labels_of(image_ids)
    if given is None:
        return of_folder
    is_other = pc.fill_null(pc.not_equal(given, of_folder), False)
    if pc.any(is_other).as_py():
        row = pc.index(is_other, True).as_py()
        raise ArchiveError(
            f"{image_ids[row].as_py()!r} has the label {given[row].as_py()} beside it but lies in a folder that says "
            f"{of_folder[row].as_py()}; here 0 is uninfected and 1 parasitized: write names instead of numbers"
        )
    return pc.coalesce(given, of_folder)


def _check_named(listing: pa.Table, names: pa.Array, url: str) -> None:
    """Says how many names of the patient mapping are in the archive. Raises: `PatientMappingError` where none is."""
    n_found = sum(
        pc.sum(pc.is_in(file_names(chunk), value_set=names)).as_py() or 0 for chunk in listing["image_id"].chunks
    )
    if not n_found:
        raise PatientMappingError(
            f"none of the {len(names):,} file names in the patient mapping, {names[0].as_py()!r} the first, is in "
            f"{url}, which has {listing['image_id'][0].as_py()!r}; give the mapping of this archive, names without "
            "folders"
        )
    log.info("patients of %s of %s files by the mapping", f"{n_found:,}", f"{listing.num_rows:,}")


def _order(listing: pa.Table) -> pa.Array | None:
    """The rows by container, offset and name, so that neighbours are read by one request; None where they are so."""
    keys = listing.select(["offset", "image_id"])
    n_containers = len(pc.unique(listing["container"]))
    if n_containers > 1:  # by their ranks: Arrow does not sort dictionaries
        coded = listing.select(["container"]).unify_dictionaries()["container"]
        ranks = pc.rank(coded.chunk(0).dictionary)
        keys = keys.add_column(0, "container", pa.chunked_array([ranks.take(chunk.indices) for chunk in coded.chunks]))
    if listing["offset"].null_count == listing.num_rows:
        keys = keys.drop_columns(["offset"])
    elif n_containers == 1 and _is_increasing(listing["offset"]):
        return None
    return pc.sort_indices(keys, [(name, "ascending") for name in keys.column_names])


def _is_increasing(column: pa.ChunkedArray) -> bool:
    return not column.null_count and bool((np.diff(column.to_numpy()) > 0).all())


def _check_unique(listing: pa.Table, url: str) -> None:
    if pc.count_distinct(listing["image_id"], mode="all").as_py() < listing.num_rows:
        counts = pc.value_counts(listing["image_id"])
        doubled = counts.filter(pc.greater(counts.field("counts"), 1))
        name = doubled.field("values")[0].as_py()
        raise ArchiveError(
            f"{url} holds {len(doubled)} names more than once, {name!r} the first; a name must be unique: pack the "
            f"archive anew"
        )
