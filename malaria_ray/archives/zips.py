"""A .zip read in place: its central directory once, then each member's bytes by range."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from upath import UPath

from malaria_ray.errors import ArchiveError
from malaria_ray.runtime import storage

_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflate"}
_ENCRYPTED = 0x1
_LONGEST_HEADER = 30 + 2 * 0xFFFF  # a local header with the longest name and extra field


class ZipArchive:
    """All members of a .zip but its folders; `image_id` is the member's name."""

    def __init__(self, path: UPath):
        self.path = path
        self.url = str(path)

    def identity(self) -> dict[str, Any]:
        try:
            info = self.path.fs.info(self.path.path)
        except Exception as error:
            raise self._not_reached(error) from error
        return {"archive": self.url, "archive_bytes": info["size"]}

    def places(self) -> Iterator[pa.Table]:
        members, end = self._directory()
        offsets = sorted(member.header_offset for member in members)
        ends = dict(zip(offsets, [*offsets, end][1:], strict=True))
        largest = max([0, *(max(member.file_size, member.compress_size, member.header_offset) for member in members)])
        if largest >= 2**63:
            raise ArchiveError(
                f"{self.url} is no zip archive that can be read: its directory speaks of {largest:,} bytes"
            )
        members = [member for member in members if not member.filename.endswith("/")]
        yield pa.table(
            {
                "image_id": pa.array([member.filename for member in members], pa.string()),
                "n_bytes": pa.array([member.file_size for member in members], pa.int64()),
                "container": pa.repeat(storage.as_url(self.path), len(members)),
                "method": pa.array([_method(member) for member in members], pa.string()),
                "offset": pa.array([member.header_offset for member in members], pa.int64()),
                "span": pa.array([_span(member, ends[member.header_offset]) for member in members], pa.int64()),
                "packed_bytes": pa.array([member.compress_size for member in members], pa.int64()),
                "crc32": pa.array([member.CRC for member in members], pa.int64()),
            }
        )

    def _directory(self) -> tuple[list[zipfile.ZipInfo], int]:
        try:
            with self.path.fs.open(self.path.path, "rb") as file, zipfile.ZipFile(file) as archive:
                return archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, UnicodeDecodeError) as error:
            raise ArchiveError(
                f"{self.url} is no complete zip archive: {error}; it may have been cut off, fetch it again"
            ) from error
        except (ValueError, NotImplementedError) as error:
            if storage.is_local(self.path) or "zip file version" in str(error):
                raise ArchiveError(f"{self.url} is no zip archive that can be read: {error}; pack it anew") from error
            raise ArchiveError(  # what fsspec says where a server gives no ranges
                f"{self.url}: the server does not answer range requests ({error}), which reading a zip in place needs; "
                "download the file and give its path"
            ) from error
        except Exception as error:
            raise self._not_reached(error) from error

    def _not_reached(self, error: Exception) -> ArchiveError:
        """One line for what the clients raise: to fsspec's HTTP all is 'not found', botocore has own kinds."""
        if isinstance(error, FileNotFoundError):
            why = f" ({error.__cause__})" if error.__cause__ else ""
            return ArchiveError(f"{self.url} is not there{why}; check the path")
        return ArchiveError(f"{self.url} cannot be read: {error}; check the address and your permissions")


def _span(member: zipfile.ZipInfo, end: int) -> int:
    """Bytes to read for a member whose next neighbour begins at `end`, without what may lie unused between them."""
    longest = _LONGEST_HEADER + member.compress_size
    return max(0, min(end - member.header_offset, longest))


def _method(member: zipfile.ZipInfo) -> str:
    if member.flag_bits & _ENCRYPTED:
        return "encrypted"
    return _METHODS.get(member.compress_type, f"zip method {member.compress_type}")
