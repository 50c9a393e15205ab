"""From places in an archive to pixels: the only reader, used by ingest and screen alike."""

from __future__ import annotations

import stat
import struct
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from malaria_ray.archives import containers
from malaria_ray.archives.parquets import read_rows
from malaria_ray.cells.crops import crop_pixels
from malaria_ray.cells.images import Pixels, content_digest, decode, resize
from malaria_ray.errors import ImageRefused, ReadError
from malaria_ray.runtime import storage
from malaria_ray.schema import OK, Reason

MAX_FILE_BYTES = 512 * 1024**2
"""Larger files are refused unread: no cell image is that large, and a packed one can be made to fill the memory."""

UNKNOWN_BYTES = 64 * 1024
"""Taken for a file whose size its archive does not tell."""

_READ_BYTES = 32 * 1024**2  # files are read in groups of about this size, so memory does not grow with the shard
_REQUEST_BYTES = 4 * 1024**2  # neighbours in one container are read by one request of up to this size
_GAP_BYTES = 4096  # what lies between two members of a tar is read with them
_CELL_COLUMNS = ["image_id", "label", "patient_id", "n_bytes", "width", "height", "content_digest", "status", "detail"]
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True)
class Cells:
    """The cells of some listing rows.

    `table`: the columns image_id, label, patient_id, n_bytes, width, height, content_digest, status, detail; one row
    per listing row, in its order. `pixels`: uint8 (n_ok, size, size, 3), RGB, one for each row whose status is `ok`,
    in the same order.
    """

    table: pa.Table
    pixels: Pixels


def read_cells(listing: pa.Table, *, image_size: int) -> Cells:
    """Reads, decodes and resizes the files of a listing. What cannot be used becomes a status, never an error."""
    if listing.num_rows and listing["method"][0].as_py() == "crops":
        return _read_crops(listing, image_size=image_size)
    n = listing.num_rows
    pixels = np.empty((n, image_size, image_size, 3), np.uint8)
    width, height = np.zeros(n, np.int32), np.zeros(n, np.int32)
    digests: list[str | None] = [None] * n
    sizes: list[int | None] = [None] * n
    status = [OK] * n
    detail: list[str | None] = [None] * n
    n_ok = 0
    for row, data in enumerate(read_files(listing)):
        try:
            if isinstance(data, ReadError):
                raise data
            digests[row], sizes[row] = content_digest(data), len(data)
            image = decode(data)
            resize(image, image_size, out=pixels[n_ok])
            height[row], width[row] = image.shape[:2]
            n_ok += 1
        except (ImageRefused, ReadError) as refusal:
            status[row], detail[row] = refusal.reason.value, refusal.detail
    bad = np.array([value != OK for value in status], bool)
    table = listing.select(["image_id", "label", "patient_id", "n_bytes"])
    table = table.set_column(3, "n_bytes", pc.coalesce(pa.array(sizes, pa.int64()), table["n_bytes"]))
    for name, column in (
        ("width", pa.array(width, mask=bad)),
        ("height", pa.array(height, mask=bad)),
        ("content_digest", pa.array(digests, pa.string())),
        ("status", pa.array(status, pa.string())),
        ("detail", pa.array(detail, pa.string())),
    ):
        table = table.append_column(name, column)
    return Cells(table=table, pixels=pixels[:n_ok])


def read_again(
    listing: pa.Table, digests: Mapping[str, str], *, image_size: int
) -> tuple[dict[str, Pixels], dict[str, str]]:
    """({image_id: its crop, uint8 (size, size, 3)}, {image_id: why there is none}) of files that were read before.

    `digests`: the content_digest of each wanted image_id. The archive may be gone, or hold other bytes under the same
    name since: then there is no crop, never a wrong one.
    """
    crops: dict[str, Pixels] = {}
    missing = dict.fromkeys(digests, "it is not in the listing")
    for container in pc.unique(listing["container"]).to_pylist():
        rows = listing.filter(pc.equal(listing["container"], container))
        rows = rows.sort_by([("offset", "ascending"), ("image_id", "ascending")])
        try:
            cells = read_cells(rows, image_size=image_size)
        except Exception as error:  # whatever a storage client raises where the archive is no longer to be had
            reason = f"{container} cannot be read: {type(error).__name__}"
            missing.update(dict.fromkeys(rows["image_id"].to_pylist(), reason))
            continue
        pixels = iter(cells.pixels)
        for cell in cells.table.select(["image_id", "status", "detail", "content_digest"]).to_pylist():
            name, crop = cell["image_id"], next(pixels) if cell["status"] == OK else None
            if crop is None:
                why = str(cell["detail"] or cell["status"]).partition(":")[0]
                missing[name] = f"{container} does not give it: {why}"
            elif cell["content_digest"] != digests[name]:
                missing[name] = "the archive has other bytes under this name now"
            else:
                crops[name] = crop
                del missing[name]
    return crops, missing


def read_files(listing: pa.Table) -> Iterator[bytes | ReadError]:
    """The encoded bytes of each row in order; a `ReadError` with its reason where they could not be had."""
    rows = listing.select(
        ["image_id", "container", "method", "n_bytes", "offset", "span", "packed_bytes", "crc32"]
    ).to_pylist()
    group: list[dict[str, Any]] = []
    group_bytes = 0
    for row in rows:
        told = (row["span"], row["n_bytes"], row["packed_bytes"])
        size = next((n for n in told if n is not None), UNKNOWN_BYTES)
        if group and (row["container"] != group[0]["container"] or group_bytes + size > _READ_BYTES):
            yield from _read_group(group)
            group, group_bytes = [], 0
        group.append(row)
        group_bytes += size if _refused_unread(row) is None else 0
    if group:
        yield from _read_group(group)


def _read_group(rows: list[dict[str, Any]]) -> Iterator[bytes | ReadError]:
    readable = [row for row in rows if _refused_unread(row) is None]
    if rows[0]["method"] == "parquet":
        loaded = read_rows(rows[0]["container"], [row["offset"] for row in readable])
    else:
        loaded = _load_files(readable) if rows[0]["offset"] is None else _load_members(readable)
    for row in rows:
        yield _refused_unread(row) or next(loaded)


def _refused_unread(row: dict[str, Any]) -> ReadError | None:
    """Why a file is refused without reading it; None where it is read."""
    method = row["method"]
    if method == "encrypted":
        return ReadError(Reason.ENCRYPTED, "the archive member is encrypted")
    if method == "file" and storage.VERSION in row["image_id"] and row["container"].startswith(("s3:", "s3a:")):
        return ReadError(
            Reason.UNREADABLE,
            f"the client of S3 takes {storage.VERSION} in a key for a version; copy it to another key",
        )
    if method in ("file", "stored", "deflate", "tar", "parquet"):
        if (largest := max(row["n_bytes"] or 0, row["packed_bytes"] or 0)) > MAX_FILE_BYTES:
            return ReadError(Reason.TOO_LARGE, f"{largest:,} bytes; at most {MAX_FILE_BYTES:,} are read")
        if method in ("stored", "deflate") and (row["offset"] < 0 or row["span"] < _LOCAL_HEADER.size):
            return _not_there()
        return None
    if method.startswith("zip method"):
        return ReadError(Reason.UNSUPPORTED_COMPRESSION, f"{method}; allowed are stored and deflate")
    return ReadError(Reason.UNREADABLE, f"not a regular file but {method}")


def _load_files(rows: list[dict[str, Any]]) -> Iterator[bytes | ReadError]:
    """Whole files below one folder."""
    if not rows:
        return
    root = storage.locate(rows[0]["container"])
    prefix = root.path.rstrip("/") + "/"
    paths = [prefix + storage.address_of(row["image_id"], root) for row in rows]
    special = {path for path in paths if storage.is_local(root) and _is_special(path)}
    rows = [row for row, path in zip(rows, paths, strict=True) if path not in special]
    sizes = [0 if storage.is_local(root) else row["n_bytes"] or 0 for row in rows]
    starts = [0 if size else None for size in sizes]  # "from 0" spares s3fs a request for the size of each
    read = [path for path in paths if path not in special]
    fetched = iter(_fetch(root.fs, read, starts, [None] * len(read), sizes))
    for path in paths:
        if path in special:
            yield ReadError(Reason.UNREADABLE, "no regular file any more")
            continue
        data = next(fetched)
        yield data if isinstance(data, bytes) else containers.unreadable(data)


def _is_special(path: str) -> bool:
    """Whether a local path is a pipe, socket or device by now, of which reading might never end."""
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return False  # reading says why
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _load_members(rows: list[dict[str, Any]]) -> Iterator[bytes | ReadError]:
    """Members of one zip or tar: neighbours are fetched by one request, then cut apart."""
    if not rows:
        return
    container = storage.locate(rows[0]["container"])
    requests = _requests([(row["offset"], row["offset"] + row["span"]) for row in rows if row["span"]])
    starts, ends = [start for start, _ in requests], [end for _, end in requests]
    sizes = [0 if storage.is_local(container) else end - start for start, end in requests]
    fetched = _fetch(container.fs, [container.path] * len(requests), starts, ends, sizes)
    held = -1
    for row in rows:
        start, end = row["offset"], row["offset"] + row["span"]
        if start == end:
            yield b""
            continue
        held = next(i for i in range(max(held, 0), len(requests)) if requests[i][0] <= start and end <= requests[i][1])
        data = fetched[held]
        if not isinstance(data, bytes):
            yield containers.unreadable(data)
            continue
        base = requests[held][0]
        if len(data) > requests[held][1] - base:
            yield ReadError(
                Reason.UNREADABLE, "the server sent more than was asked for: it does not answer range requests"
            )
            continue
        try:
            yield _unpack(data[start - base : end - base], row)
        except ReadError as error:
            yield error


def _fetch(
    fs: Any, paths: list[str], starts: Sequence[int | None], ends: Sequence[int | None], sizes: list[int]
) -> list[bytes | BaseException]:
    """The bytes of each range, or what the last try of it raised. Fewer than `sizes` are a failure: a connection that
    was cut does not always say so.
    """
    fetched: list[bytes | BaseException] = fs.cat_ranges(paths, list(starts), list(ends), on_error="return")
    fetched = [_of_size(data, size) for data, size in zip(fetched, sizes, strict=True)]
    for wait_s in containers.WAITS_S:
        failed = [i for i, data in enumerate(fetched) if not isinstance(data, (bytes, *containers.FINAL))]
        if not failed:
            break
        time.sleep(wait_s)
        again = fs.cat_ranges(
            [paths[i] for i in failed], [starts[i] for i in failed], [ends[i] for i in failed], on_error="return"
        )
        for i, data in zip(failed, again, strict=True):
            fetched[i] = _of_size(data, sizes[i])
    return fetched


def _of_size(data: bytes | BaseException, size: int) -> bytes | BaseException:
    if isinstance(data, bytes) and len(data) < size:
        return OSError(f"{len(data):,} bytes came of {size:,}")
    return data


def _requests(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Joins ranges, ordered by start, that touch or nearly so, up to `_REQUEST_BYTES` a request."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and 0 <= start - joined[-1][1] <= _GAP_BYTES and end - joined[-1][0] <= _REQUEST_BYTES:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _unpack(record: bytes, row: dict[str, Any]) -> bytes:
    """The unpacked bytes of one member; `record` begins at a zip's local header, at a tar member's bytes."""
    if row["method"] == "tar":
        if len(record) < row["span"]:
            raise ReadError(Reason.CORRUPT, "the tar ends before the member does")
        return record
    if len(record) < row["span"] or len(record) < _LOCAL_HEADER.size or record[:4] != b"PK\x03\x04":
        raise _not_there()
    *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(record)
    start = _LOCAL_HEADER.size + name_bytes + extra_bytes
    packed = record[start : start + row["packed_bytes"]]
    if row["method"] == "stored":
        data = packed
    else:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, row["n_bytes"] + 1)
        except zlib.error as error:
            raise ReadError(Reason.CORRUPT, f"cannot be unpacked: {error}") from error
    if len(data) != row["n_bytes"] or zlib.crc32(data) != row["crc32"]:
        raise ReadError(Reason.CHECKSUM_MISMATCH, "size or CRC-32 differs from the archive's directory")
    return data


def _not_there() -> ReadError:
    return ReadError(Reason.CORRUPT, "no zip member stands where the archive's directory says")


def _rows_of(path: UPath, rows: npt.NDArray[np.int64]) -> pa.Table:
    """Rows of one Parquet file by their numbers, from the row groups that hold them alone."""
    with containers.open_file(path, is_read_in_order=False) as file:
        parquet = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
        metadata = parquet.metadata
        sizes = np.array([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
        ends = np.cumsum(sizes)
        groups, at = np.unique(np.searchsorted(ends, rows, side="right"), return_inverse=True)
        table = parquet.read_row_groups(groups.tolist())
    skipped = ends[groups] - np.cumsum(sizes[groups])  # rows before each group that were not read
    return table.take(rows - skipped[at])


def _read_crops(listing: pa.Table, *, image_size: int) -> Cells:
    """Cells of a dataset: rows of its `crops` parts, no decoding."""
    tables, pixels = [], [np.empty((0, image_size, image_size, 3), np.uint8)]
    for container in pc.unique(listing["container"]).to_pylist():
        rows = listing.filter(pc.equal(listing["container"], container))
        offsets = rows["offset"].to_numpy()
        part = containers.tried(partial(_rows_of, storage.locate(container), offsets))
        n = rows.num_rows
        if isinstance(part, ReadError):
            known, status, detail = rows, part.reason.value, part.detail
            for name, type_ in (("width", pa.int32()), ("height", pa.int32()), ("content_digest", pa.string())):
                known = known.append_column(name, pa.nulls(n, type_))
        else:
            known, status, detail = part.append_column("n_bytes", rows["n_bytes"]), OK, None
            pixels.append(crop_pixels(part["image"], image_size=image_size))
        known = known.append_column("status", pa.repeat(status, n))
        known = known.append_column("detail", pa.array([detail] * n, pa.string()))
        tables.append(known.select(_CELL_COLUMNS))
    return Cells(table=pa.concat_tables(tables), pixels=np.concatenate(pixels))
