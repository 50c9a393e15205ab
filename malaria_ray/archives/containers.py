"""One file that holds many, read by ranges: opening it, and what is said where that fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import pyarrow as pa
from upath import UPath

from malaria_ray.errors import ArchiveError, ReadError
from malaria_ray.runtime import storage
from malaria_ray.runtime.redaction import without_secrets
from malaria_ray.schema import Reason

log = logging.getLogger("malaria_ray")

T = TypeVar("T")

_NO_RANGES = "the server does not answer range requests"
WAITS_S = (0.5, 1.0, 2.0)
"""Before the second, third and fourth try of a read that failed."""

FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors of which another try would be one more."""

_N_THREADS = 16  # files looked at together: what is waited for is the network
_READ_AHEAD = 8 * 1024**2  # of a remote file: its headers are read one after the other
_DETAIL_LETTERS = 300  # kept of what a storage's client says: some append a whole page


def open_file(path: UPath, *, is_read_in_order: bool) -> BinaryIO:
    """The file, to read and seek in. A remote one is read ahead where it `is_read_in_order`, else only what is asked
    for: fsspec's default would fetch up to 50 MB more with each column of a row group.
    """
    if storage.is_local(path):
        return Path(path.path).open("rb")
    options = {"block_size": _READ_AHEAD} if is_read_in_order else {"cache_type": "none"}
    return cast(BinaryIO, path.fs.open(path.path, "rb", **options))


@contextmanager
def opened(path: UPath, *, is_read_in_order: bool = True) -> Iterator[BinaryIO]:
    """`open_file`. Raises: `ArchiveError` for what storage raises then or inside, in one line."""
    try:
        with open_file(path, is_read_in_order=is_read_in_order) as file:
            yield file
    except ArchiveError:
        raise
    except Exception as error:  # object stores' clients raise kinds of their own
        raise not_read(path, error) from error


State = dict[str, str]
"""What storage tells of a file that is another once the file was replaced: size, times, tag. `created` of a disk is the
inode's change, which nobody sets back."""


def listed(path: UPath, places: Callable[[], Iterator[pa.Table]], states: dict[str, State]) -> Iterator[pa.Table]:
    """The tables of `places`, which lists the file. A remote one that fails is listed again from its beginning. What
    state the file was in before is left in `states`, by its URL.

    Raises: `ArchiveError` of the last try, or at once where another would say the same.
    """
    url = storage.as_url(path)
    if storage.is_local(path):
        states[url] = _state(_info(path))
        yield from places()
        return
    for wait_s in (*WAITS_S, None):
        try:
            states[url] = _state(_info(path))
            tables = list(places())
        except ArchiveError as error:
            is_final = isinstance(error.__cause__, FINAL) or _NO_RANGES in str(error)
            if wait_s is None or is_final:
                raise
            log.info("%s; trying again", error)
            time.sleep(wait_s)
        else:
            yield from tables
            return


def name_of(path: UPath) -> str:
    """Name of the file. A signed URL has more behind it, which is a secret; one of S3 may have a version."""
    if storage.is_local(path):
        return path.name
    return path.name.partition("?" if storage.is_web(path) else storage.VERSION)[0]


def n_bytes(path: UPath) -> int:
    """Size of the file. Raises: `ArchiveError` in one line."""
    return int(_info(path)["size"] or 0)


_STATE = (
    *("size", "mtime", "created", "ETag", "LastModified", "Last-Modified"),
    *("etag", "last_modified", "updated", "md5Hash"),
)


def _state(info: dict[str, Any]) -> State:
    return {name: str(info[name]) for name in _STATE if name in info}


def _info(path: UPath) -> dict[str, Any]:
    """What storage tells of the file. Raises: `ArchiveError` in one line."""
    try:
        return cast("dict[str, Any]", path.fs.info(path.path))
    except Exception as error:
        raise not_read(path, error) from error


def state(path: UPath) -> State:
    """The state of a file that was there before. Raises: `ArchiveError`."""
    found = tried(lambda: path.fs.info(path.path))
    if isinstance(found, ReadError):
        raise ArchiveError(f"{path} cannot be looked at: {found.detail}; check that it is still there")
    return _state(found)


def states(paths: Sequence[UPath]) -> dict[str, State]:
    """The states of many files by their URLs. Raises: `ArchiveError`."""
    with ThreadPoolExecutor(_N_THREADS) as pool:
        return dict(zip(map(storage.as_url, paths), pool.map(state, paths), strict=True))


def not_read(path: UPath, error: Exception) -> ArchiveError:
    """One line for what the clients raise: to fsspec's HTTP all is 'not found', botocore has own kinds."""
    if isinstance(error, FileNotFoundError):
        why = f" ({error.__cause__})" if error.__cause__ else ""
        if "Connect" in type(error.__cause__).__name__:
            return ArchiveError(f"{path} cannot be reached{why}; check the address and whether its server runs")
        return ArchiveError(f"{path} is not there{why}; check the path")
    if isinstance(error, ValueError) and not storage.is_local(path):  # fsspec's, where a server gives no ranges
        return ArchiveError(
            f"{path}: {_NO_RANGES} ({error}), which reading in place needs; download the file and give its path"
        )
    return ArchiveError(f"{path} cannot be read: {error}; check the address and your permissions")


def tried(read: Callable[[], T]) -> T | ReadError:
    """What `read` gives, tried again after each of `WAITS_S`; what its last try raised where that fails too."""
    for wait_s in (*WAITS_S, None):
        try:
            return read()
        except Exception as error:  # storage's clients and Parquet's reader raise kinds of their own
            if wait_s is None or isinstance(error, (*FINAL, IndexError)):
                return unreadable(error)
            time.sleep(wait_s)
    raise AssertionError("the last try returns")


def unreadable(error: BaseException) -> ReadError:
    """One line for what reading one image of the file raised, as it stands in quarantine."""
    why = without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))
    return ReadError(Reason.UNREADABLE, why[:_DETAIL_LETTERS])
