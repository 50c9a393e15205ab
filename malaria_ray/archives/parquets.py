"""Parquet files of encoded images, one a row: listed from their small columns, read row group by row group.

The image is the column `image` or `bytes`: binary, or a struct with the fields `bytes` and `path` as Hugging Face
datasets have it. The name is the column `image_id`, `path` or `file_name`, else the struct's `path`, else the file's
name and the row's number. `label` (numbers, names, or Hugging Face's ClassLabel) and `patient_id` are taken where they
are there. In what `pack` wrote, rows whose `status` is not `ok` keep their reason, and bytes are compared with their
`content_digest`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from malaria_ray.archives import containers
from malaria_ray.archives.labels import label_number
from malaria_ray.cells.images import content_digest
from malaria_ray.errors import ArchiveError, ReadError
from malaria_ray.runtime import outputs, storage
from malaria_ray.schema import OK, PACKED, Reason

_BATCH = 10_000
_ROWS_AT_A_TIME, _BYTES_AT_A_TIME = 128, 32 * 1024**2  # of images, whichever is less
_BUFFER_BYTES = 4 * 1024**2  # a column is read in pieces of this size, however large its row group is
_IMAGE_COLUMNS, _NAME_COLUMNS = ("image", "bytes"), ("image_id", "path", "file_name")


class ParquetArchive:
    """All rows of one Parquet file."""

    def __init__(self, path: UPath):
        self.path = path
        self.url = str(path)
        self.states: dict[str, containers.State] = {}

    def identity(self) -> dict[str, Any]:
        return {"archive": self.url, "archive_bytes": containers.n_bytes(self.path)}

    def places(self) -> Iterator[pa.Table]:
        name = without_ending(containers.name_of(self.path))
        return containers.listed(self.path, lambda: parquet_places(self.path, name=name), self.states)


class PackedArchive:
    """What `malaria-ray pack` made. Raises: `NotCompleteError` where it has no `_SUCCESS.json`."""

    def __init__(self, path: UPath):
        self.path = path
        self.url = str(path)
        self.states: dict[str, containers.State] = {}
        self.success = outputs.check_complete(path, "pack")

    def identity(self) -> dict[str, Any]:
        return {"archive": self.url, "packed_digest": self.success["packed_digest"]}

    def places(self) -> Iterator[pa.Table]:
        """From `listing.parquet`, whose containers are named from the directory: it may have been moved."""
        self.states |= containers.states(storage.parts(self.path / "images"))
        # By its digest, so that what was packed anew since it was opened is found.
        listing = outputs.read_written(self.path, self.success, "listing.parquet").drop_columns(["key"])
        root = pa.scalar(storage.as_url(self.path).rstrip("/"))
        for batch in listing.to_batches(max_chunksize=_BATCH):
            places = pa.Table.from_batches([batch])
            at = places.column_names.index("container")
            urls = pc.binary_join_element_wise(root, places["container"], "/")
            yield places.set_column(at, "container", urls)


@dataclass(frozen=True)
class _Columns:
    """Where in a file what stands; `image` and `name` may be fields of a struct, as `image.bytes`."""

    image: str
    name: str | None
    label: str | None
    patient_id: str | None
    n_bytes: str | None
    label_names: tuple[str, ...] | None


def without_ending(name: str) -> str:
    """The name without `.parquet`, in whatever case."""
    return name[: -len(".parquet")] if name.lower().endswith(".parquet") else name


def is_parquet_of_images(path: UPath) -> bool:
    """Whether it is Parquet with a column of encoded images. Raises: `ArchiveError` where it cannot be opened."""
    try:
        with containers.opened(path, is_read_in_order=False) as file:
            return _image_column(pq.read_schema(file)) is not None
    except ArchiveError as error:
        if _is_no_table(error.__cause__, path):
            return False
        raise


def _is_no_table(error: BaseException | None, path: UPath) -> bool:
    """Whether Parquet's reader refuses the content. Of a footer that is none, or encrypted, it raises an OSError
    without a number; from an object store's client that may be anything.
    """
    return isinstance(error, pa.ArrowInvalid) or (
        isinstance(error, OSError) and error.errno is None and storage.is_local(path)
    )


def parquet_places(path: UPath, *, name: str) -> Iterator[pa.Table]:
    """The rows of one file, a bounded number at a time, without reading an image. `name` begins the names of rows that
    have none.
    """
    try:
        with containers.opened(path, is_read_in_order=False) as file:
            yield from _places(pq.ParquetFile(file), path, name)
    except ArchiveError as error:
        if _is_no_table(error.__cause__, path):
            raise ArchiveError(f"{path} is no complete Parquet file: {error.__cause__}; fetch it again") from error
        raise


def _places(parquet: pq.ParquetFile, path: UPath, name: str) -> Iterator[pa.Table]:
    columns = _columns(parquet.schema_arrow, path)
    wanted = [columns.name, columns.label, columns.patient_id, columns.n_bytes]
    read = [column for column in wanted if column]
    n_rows, row = parquet.metadata.num_rows, 0
    estimate = _bytes_a_row(parquet, columns.image)
    url = storage.as_url(path)
    while row < n_rows and not read:
        n = min(_BATCH, n_rows - row)
        yield _table(url, row, n, None, estimate, name)
        row += n
    if not read:
        return
    for batch in parquet.iter_batches(batch_size=_BATCH, columns=read, use_threads=False):
        table = _table(url, row, batch.num_rows, _names(batch, columns.name), estimate, name)
        if columns.n_bytes:
            table = table.append_column("n_bytes", _of(batch, columns.n_bytes).cast(pa.int64()))
        if columns.label:
            table = table.append_column("label", _labels(_of(batch, columns.label), columns.label_names, path))
        if columns.patient_id:
            table = table.append_column("patient_id", _of(batch, columns.patient_id).cast(pa.string()))
        yield table
        row += batch.num_rows


def _table(url: str, first: int, n: int, names: pa.Array | None, estimate: int, name: str) -> pa.Table:
    rows = np.arange(first, first + n)
    if names is None or names.null_count:
        numbered = pa.array([f"{name}/{row:08d}" for row in rows], pa.string())
        names = numbered if names is None else pc.coalesce(names, numbered)
    return pa.table(
        {
            "image_id": names,
            "container": pa.repeat(url, n),
            "method": pa.repeat("parquet", n),
            "offset": pa.array(rows, pa.int64()),
            "packed_bytes": pa.repeat(pa.scalar(estimate, pa.int64()), n),
        }
    )


def _columns(schema: pa.Schema, path: UPath) -> _Columns:
    image = _image_column(schema)
    if image is None:
        raise ArchiveError(
            f"{path} has no column of encoded images: found {', '.join(schema.names)[:200]}; allowed are a column "
            "'image' or 'bytes' of binary or of struct<bytes, path> (crops of a dataset: give the dataset's directory)"
        )
    name = next((column for column in _NAME_COLUMNS if _is_text(schema, column)), None)
    if name is None and image.endswith(".bytes"):
        struct = schema.field(image.removesuffix(".bytes")).type
        name = image.removesuffix("bytes") + "path" if struct.get_field_index("path") >= 0 else None
    has = set(schema.names)
    return _Columns(
        image=image,
        name=name,
        label="label" if "label" in has else None,
        patient_id="patient_id" if "patient_id" in has else None,
        n_bytes="n_bytes" if "n_bytes" in has else None,
        label_names=_label_names(schema),
    )


def _image_column(schema: pa.Schema) -> str | None:
    for column in _IMAGE_COLUMNS:
        if column not in schema.names:
            continue
        type_ = schema.field(column).type
        if _is_bytes(type_):
            return column
        if (
            pa.types.is_struct(type_)
            and (at := type_.get_field_index("bytes")) >= 0
            and _is_bytes(type_.field(at).type)
        ):
            return f"{column}.bytes"
    return None


def _is_bytes(type_: pa.DataType) -> bool:
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def _is_text(schema: pa.Schema, column: str) -> bool:
    if column not in schema.names:
        return False
    type_ = schema.field(column).type
    if pa.types.is_dictionary(type_):  # a category of pandas
        type_ = type_.value_type
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def _label_names(schema: pa.Schema) -> tuple[str, ...] | None:
    """The names behind the numbers, where Hugging Face's datasets wrote them into the footer."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _of(batch: pa.RecordBatch, column: str) -> pa.Array:
    outer, _, field = column.partition(".")
    array = batch.column(outer)
    return pc.struct_field(array, field) if field else array


def _names(batch: pa.RecordBatch, column: str | None) -> pa.Array | None:
    return _of(batch, column).cast(pa.string()) if column else None


def _labels(column: pa.Array, names: tuple[str, ...] | None, path: UPath) -> pa.Array:
    encoded = column.dictionary_encode() if not pa.types.is_dictionary(column.type) else column
    values = encoded.dictionary.to_pylist()
    if names is not None:
        values = [names[value] if isinstance(value, int) and 0 <= value < len(names) else value for value in values]
    numbers = [label_number(value, where=f"{path}: column label") for value in values]
    return pa.array(numbers, pa.int8()).take(encoded.indices)


def _bytes_a_row(parquet: pq.ParquetFile, image: str) -> int:
    """Mean bytes of an image as packed, from the footer."""
    metadata = parquet.metadata
    if not metadata.num_rows:
        return 0
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    at = paths.index(image)
    groups = (metadata.row_group(i).column(at).total_compressed_size for i in range(metadata.num_row_groups))
    return int(sum(groups) // metadata.num_rows)


def read_rows(container: str, offsets: Sequence[int]) -> Iterator[bytes | ReadError]:
    """The encoded bytes of rows of one file, in the order of `offsets`; a `ReadError` for each that cannot be had.

    Of a row group only the wanted rows are kept.
    """
    path = storage.locate(container)
    metadata = containers.tried(lambda: _metadata(path))
    if isinstance(metadata, ReadError):
        yield from (metadata for _ in offsets)
        return
    begins = np.cumsum([0, *(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))])
    groups = (np.searchsorted(begins, offsets, side="right") - 1).tolist()
    for group, run in itertools.groupby(zip(groups, offsets, strict=True), key=lambda pair: pair[0]):
        wanted = [offset - int(begins[group]) for _, offset in run]
        held: dict[int, bytes | ReadError] = {}
        failure = containers.tried(partial(_read_group, path, metadata, group, wanted, held))
        absent = failure or ReadError(Reason.UNREADABLE, "the file has no such row any more")
        yield from (held.get(row, absent) for row in wanted)  # rows before a damaged page are there


def _metadata(path: UPath) -> pq.FileMetaData:
    with containers.open_file(path, is_read_in_order=False) as file:
        return pq.read_metadata(file)


def _read_group(
    path: UPath, metadata: pq.FileMetaData, group: int, wanted: list[int], held: dict[int, bytes | ReadError]
) -> None:
    """Rows of one row group by their numbers in it, into `held`, each as soon as it is read."""
    cursor = _kept.pop() if _kept else None
    if cursor is None or not cursor.leads_to(path, metadata, group, min(wanted)):
        cursor = _Cursor(path, metadata, group)
    cursor.read(wanted, held)
    if not cursor.is_at_end:
        _kept[:] = [cursor]


class _Cursor:
    """How far a row group was read. Many writers make one of a whole file, of which each block wants some rows: without
    it every block would decode all rows before its own.
    """

    def __init__(self, path: UPath, metadata: pq.FileMetaData, group: int):
        self._of = (str(path), group)
        self._metadata = metadata
        file = containers.open_file(path, is_read_in_order=False)
        # Buffered and not pre-buffered, so that only a part of a large row group is in memory.
        parquet = pq.ParquetFile(file, metadata=metadata, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        schema = parquet.schema_arrow
        self._image = _columns(schema, path).image
        is_packed = (schema.metadata or {}).get(b"malaria_ray.table") == PACKED.name.encode()
        self._told = ["status", "detail", "content_digest"] if is_packed else []
        self._batches = parquet.iter_batches(
            _rows_at_a_time(metadata, group, self._image),
            row_groups=[group],
            columns=[self._image, *self._told],
            use_threads=False,
        )
        self._first, self._batch = 0, next(self._batches, None)

    @property
    def is_at_end(self) -> bool:
        return self._batch is None

    def leads_to(self, path: UPath, metadata: pq.FileMetaData, group: int, row: int) -> bool:
        """Whether `row` of that group of that very file lies here or ahead."""
        return self._of == (str(path), group) and row >= self._first and bool(self._metadata.equals(metadata))

    def read(self, wanted: list[int], held: dict[int, bytes | ReadError]) -> None:
        needed, last = set(wanted), max(wanted)
        while self._batch is not None and self._first <= last:
            end = self._first + self._batch.num_rows
            rows = sorted(needed.intersection(range(self._first, end)))
            taken = self._batch.take(pa.array([row - self._first for row in rows], pa.int64()))
            told = taken.select(self._told).to_pylist() if self._told else [{}] * len(rows)
            for row, data, packed in zip(rows, _of(taken, self._image).to_pylist(), told, strict=True):
                held[row] = _checked(data, packed)
            if end > last + 1:
                break
            self._first, self._batch = end, next(self._batches, None)


def _rows_at_a_time(metadata: pq.FileMetaData, group: int, image: str) -> int:
    """As many rows as memory is meant for: of images of 16 MB two, for Arrow makes one array of all."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    of_group = metadata.row_group(group)
    n_bytes = int(of_group.column(paths.index(image)).total_uncompressed_size)
    return max(1, min(_ROWS_AT_A_TIME, _BYTES_AT_A_TIME * int(of_group.num_rows) // max(1, n_bytes)))


_kept: list[_Cursor] = []
"""The last one of this process, where there is more to read."""


def _checked(data: bytes | None, packed: dict[str, Any]) -> bytes | ReadError:
    if packed.get("status", OK) != OK:
        return ReadError(Reason(packed["status"]), packed["detail"] or "")
    if data is None:
        return ReadError(Reason.UNREADABLE, "the row holds no bytes")
    if (digest := packed.get("content_digest")) and content_digest(data) != digest:
        return ReadError(Reason.CHECKSUM_MISMATCH, "the bytes are not those that were packed: their SHA-256 differs")
    return data
