"""One file that holds many, read by ranges: opening it, and what is said where that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from upath import UPath

from malaria_ray.errors import ArchiveError
from malaria_ray.runtime import storage

_READ_AHEAD = 8 * 1024**2  # of a remote file: its headers are read one after the other


@contextmanager
def opened(path: UPath) -> Iterator[BinaryIO]:
    """The file, to read and seek in. Raises: `ArchiveError` for what storage raises inside, in one line."""
    try:
        if storage.is_local(path):
            with Path(path.path).open("rb") as file:
                yield file
        else:
            with path.fs.open(path.path, "rb", block_size=_READ_AHEAD) as file:
                yield cast(BinaryIO, file)
    except ArchiveError:
        raise
    except Exception as error:  # object stores' clients raise kinds of their own
        raise not_read(path, error) from error


def n_bytes(path: UPath) -> int:
    """Size of the file. Raises: `ArchiveError` in one line."""
    try:
        return int(path.fs.info(path.path)["size"] or 0)
    except Exception as error:
        raise not_read(path, error) from error


def not_read(path: UPath, error: Exception) -> ArchiveError:
    """One line for what the clients raise: to fsspec's HTTP all is 'not found', botocore has own kinds."""
    if isinstance(error, FileNotFoundError):
        why = f" ({error.__cause__})" if error.__cause__ else ""
        return ArchiveError(f"{path} is not there{why}; check the path")
    if isinstance(error, ValueError) and not storage.is_local(path):  # fsspec's, where a server gives no ranges
        return ArchiveError(
            f"{path}: the server does not answer range requests ({error}), which reading in place needs; "
            "download the file and give its path"
        )
    return ArchiveError(f"{path} cannot be read: {error}; check the address and your permissions")
