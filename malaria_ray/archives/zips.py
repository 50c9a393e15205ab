"""A .zip read in place: its central directory once, then each member's bytes by range."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from upath import UPath

from malaria_ray.archives import containers
from malaria_ray.errors import ArchiveError
from malaria_ray.runtime import storage

_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflate"}
_ENCRYPTED = 0x1
_LONGEST_HEADER = 30 + 2 * 0xFFFF  # a local header with the longest name and extra field
_PIECE_BYTES = 2 * 1024**2  # of the directory, parsed at a time: some 20,000 members

_END = struct.Struct("<4s4H2IH")
_END64, _LOCATOR64 = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_LONGEST_END = _END64.size + _LOCATOR64.size + _END.size + 0xFFFF
_ENTRY_BYTES, _ENTRY_LENGTHS = 46, struct.Struct("<28x3H")


class ZipArchive:
    """All members of a .zip but its folders; `image_id` is the member's name."""

    def __init__(self, path: UPath):
        self.path = path
        self.url = str(path)
        self.states: dict[str, containers.State] = {}

    def identity(self) -> dict[str, Any]:
        return {"archive": self.url, "archive_bytes": containers.n_bytes(self.path)}

    def places(self) -> Iterator[pa.Table]:
        return containers.listed(self.path, self._opened_places, self.states)

    def _opened_places(self) -> Iterator[pa.Table]:
        try:
            with containers.opened(self.path) as file:
                yield from self._places(file)
        except ArchiveError as error:
            cause = error.__cause__
            if isinstance(cause, (zipfile.BadZipFile, UnicodeDecodeError)):
                raise ArchiveError(
                    f"{self.url} is no complete zip archive: {cause}; it may have been cut off, fetch it again"
                ) from cause
            if isinstance(cause, NotImplementedError) or (
                isinstance(cause, ValueError) and storage.is_local(self.path)
            ):
                raise ArchiveError(f"{self.url} is no zip archive that can be read: {cause}; pack it anew") from cause
            raise

    def _places(self, file: BinaryIO) -> Iterator[pa.Table]:
        start, size, prefix = _end(file)
        tables = []
        for piece in _pieces(file, start, size):
            end = _END.pack(b"PK\5\6", 0, 0, 0, 0, len(piece), 0, 0)
            with zipfile.ZipFile(io.BytesIO(piece + end)) as directory:
                tables.append(self._table(directory.infolist(), prefix))
        # A member ends where the next one begins: all places must be known first, but not as Python objects.
        offsets = [table["offset"].to_numpy() for table in tables]
        begins = np.unique(np.concatenate([*offsets, [start]]))
        begins = np.append(begins[begins < start], start)
        for table, offset in zip(tables, offsets, strict=True):
            next_ = begins[np.minimum(np.searchsorted(begins, offset, side="right"), len(begins) - 1)]
            longest = _LONGEST_HEADER + table["packed_bytes"].to_numpy()
            span = np.maximum(0, np.minimum(next_ - offset, longest))
            table = table.append_column("span", pa.array(span, pa.int64()))
            yield table.filter(table["is_file"]).drop_columns(["is_file"])

    def _table(self, members: list[zipfile.ZipInfo], prefix: int) -> pa.Table:
        largest = max([0, *(max(member.file_size, member.compress_size, member.header_offset) for member in members)])
        if largest + prefix >= 2**62:
            raise ArchiveError(
                f"{self.url} is no zip archive that can be read: its directory speaks of {largest:,} bytes"
            )
        return pa.table(
            {
                "image_id": pa.array([member.filename for member in members], pa.string()),
                "n_bytes": pa.array([member.file_size for member in members], pa.int64()),
                "container": pa.repeat(storage.as_url(self.path), len(members)),
                "method": pa.array([_method(member) for member in members], pa.string()),
                "offset": pa.array([member.header_offset + prefix for member in members], pa.int64()),
                "packed_bytes": pa.array([member.compress_size for member in members], pa.int64()),
                "crc32": pa.array([member.CRC for member in members], pa.int64()),
                "is_file": pa.array([not member.filename.endswith("/") for member in members], pa.bool_()),
            }
        )


def _end(file: BinaryIO) -> tuple[int, int, int]:
    """(where the central directory begins, its bytes, bytes that stand before the archive) from the end records."""
    n_bytes = file.seek(0, io.SEEK_END)
    file.seek(max(0, n_bytes - _LONGEST_END))
    tail = file.read(_LONGEST_END)
    at = len(tail) - _END.size
    if at < 0 or tail[at : at + 4] != b"PK\5\6" or tail[-2:] != b"\0\0":  # there is a comment, or no archive
        at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise zipfile.BadZipFile("File is not a zip file")
    *_, size, offset, _ = _END.unpack_from(tail, at)
    locator, end64 = at - _LOCATOR64.size, at - _LOCATOR64.size - _END64.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\6\7":
        if _LOCATOR64.unpack_from(tail, locator)[3] > 1:
            raise zipfile.BadZipFile("zipfiles that span multiple disks are not supported")
        if end64 >= 0 and tail[end64 : end64 + 4] == b"PK\6\6":
            *_, size, offset = _END64.unpack_from(tail, end64)
            at = end64
    start = n_bytes - len(tail) + at - size
    if start < 0:
        raise zipfile.BadZipFile("Bad offset for central directory")
    return start, size, start - offset


def _pieces(file: BinaryIO, start: int, size: int) -> Iterator[bytes]:
    """The central directory in pieces of whole entries."""
    file.seek(start)
    held, left = b"", size
    while left:
        data = file.read(min(left, _PIECE_BYTES))
        if not data:
            raise zipfile.BadZipFile("Truncated central directory")
        held, left = held + data, left - len(data)
        at = 0
        while at + _ENTRY_BYTES <= len(held):
            end = at + _ENTRY_BYTES + sum(_ENTRY_LENGTHS.unpack_from(held, at))
            if end > len(held):
                break
            at = end
        yield held[:at]
        held = held[at:]
    if held:
        raise zipfile.BadZipFile("Truncated central directory")


def _method(member: zipfile.ZipInfo) -> str:
    if member.flag_bits & _ENCRYPTED:
        return "encrypted"
    return _METHODS.get(member.compress_type, f"zip method {member.compress_type}")
