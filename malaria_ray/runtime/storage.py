"""Files behind fsspec URLs: paths, whole-file reads and writes, Parquet tables.

A path is a `UPath` (universal-pathlib): `pathlib` for `/data/x`, `s3://bucket/x`, `https://…`. A write is seen whole
or not at all: by a rename on a local disk, by the one PUT of an object store.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from upath import UPath

from malaria_ray.errors import ConfigError, DirectoryError
from malaria_ray.runtime.redaction import hides_a_secret
from malaria_ray.schema import REPEATED_COLUMNS

VERSION = "?versionId="
"""Behind a key of S3, the version that is meant. Its client takes it for that in whatever key it stands."""


class FileRecord(TypedDict):
    """What `_SUCCESS.json` keeps of one file: enough to prove later that it is the one that was written."""

    bytes: int
    rows: int
    sha256: str


def locate(url: str | UPath) -> UPath:
    """The path behind a local path or fsspec URL.

    Raises: `ConfigError` where it is empty, no client for its protocol is installed, or a web address could not be told
    without its secrets.
    """
    if not str(url):
        raise ConfigError("an empty path was given; allowed are local paths and fsspec URLs")
    if hides_a_secret(str(url)):
        raise ConfigError(
            f"a web address with a space, quote or angle bracket in it was given ({str(url).partition('://')[0]}://…); "
            "percent-encode it (%20 for a space): what is secret in it could not be told from the rest"
        )
    try:
        path = UPath(url)
        path.fs  # noqa: B018 - importing the client is what may fail
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{url}: {error}; allowed are local paths and fsspec URLs whose client is installed "
            "(pip install 'malaria-ray[s3]' for s3://, 'malaria-ray[gcs]' for gs://)"
        ) from error
    if path.protocol in ("s3", "s3a", "gs", "gcs") and not path.path.strip("/"):
        raise ConfigError(f"{url} names no bucket; give it as {path.protocol}://BUCKET/NAME")
    path.fs.dircache.use_listings_cache = False  # else a folder once listed never shows what other processes write
    return _plain(path.absolute()) if is_local(path) else path


def _plain(path: UPath) -> UPath:
    """The path without its `..`, unless a symbolic link makes that another file."""
    plain = os.path.normpath(path.path)
    return UPath(plain) if os.path.realpath(plain) == os.path.realpath(path.path) else path


def short_names(paths: Sequence[UPath]) -> list[str]:
    """What tells several directories apart: their last parts, or the whole paths where two end alike."""
    last_parts = [path.path.rstrip("/").rpartition("/")[2] for path in paths]
    return last_parts if len(set(last_parts)) == len(paths) else [str(path) for path in paths]


def is_local(path: UPath) -> bool:
    return path.protocol in ("", "file", "local")


def is_web(path: UPath) -> bool:
    return path.protocol in ("http", "https")


def name_in_address(address: str, folder: UPath) -> str:
    """The name of a file below a folder: of a web address without its percent signs. Raises: `UnicodeDecodeError`."""
    return unquote(address, errors="strict") if is_web(folder) else address


def address_of(name: str, folder: UPath) -> str:
    """Inverse of `name_in_address`: what is put behind the folder to reach the file of that name."""
    return quote(name) if is_web(folder) else name


def lies_in(path: UPath, folder: UPath) -> bool:
    """Whether a path is the folder or lies below it, links followed where both are local."""
    if type(path.fs) is not type(folder.fs):
        return False
    inner, outer = (os.path.realpath(one.path) if is_local(one) else one.path for one in (path, folder))
    return f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")


def arrow_filesystem(path: UPath) -> tuple[pa.fs.FileSystem, str]:
    """(pyarrow filesystem, path in it): what Ray Data and pyarrow take."""
    if is_local(path):
        return pa.fs.LocalFileSystem(), path.path
    return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(path.fs)), path.path


def is_draft(name: str) -> bool:
    """Whether a file of this name is what a killed process was writing (`write_bytes`): of no table, and nobody's."""
    return re.fullmatch(r"\.[0-9a-f]{16}\.tmp", name) is not None


def write_bytes(path: UPath, data: bytes | memoryview) -> None:
    """Writes one file, seen whole or not at all; makes its folder."""
    if not is_local(path):
        with path.fs.open(path.path, "wb") as file:
            file.write(data)
        return
    target = Path(path.path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Random and not the process id: processes in two containers on one shared disk may have the same id.
    unfinished = target.with_name(f".{secrets.token_hex(8)}.tmp")  # as `is_draft` knows it
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    except OSError as error:  # that a disk is full is said of no file
        error.filename = error.filename or str(target)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def read_json(path: UPath) -> dict[str, Any]:
    """The file as it was or as it is where it is replaced meanwhile; opened, a file of an object store would refuse to
    be read on.
    """
    return cast("dict[str, Any]", json.loads(path.fs.cat_file(path.path)))


def write_json(path: UPath, content: dict[str, Any]) -> None:
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def write_table(
    path: UPath,
    table: pa.Table,
    *,
    row_group_rows: int = 100_000,
    dictionary: bool | list[str] | None = None,
    sorted_by: Sequence[str] = (),
) -> FileRecord:
    """Writes one Parquet file (zstd, page index, checksums) and returns its record.

    `dictionary`: columns to write as dictionaries, by default those of few distinct values that schema.py names;
    `sorted_by`: columns that the rows are sorted by, ascending, nulls last, which the footer then says.
    """
    if dictionary is None:
        dictionary = [name for name in table.column_names if name in REPEATED_COLUMNS]
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        row_group_size=row_group_rows,
        use_dictionary=dictionary,
        write_page_index=True,
        write_page_checksum=True,  # zstd has none of its own here: damaged pixels would be read as others
        sorting_columns=[pq.SortingColumn(table.schema.get_field_index(name)) for name in sorted_by] or None,
    )
    data = buffer.getbuffer()
    write_bytes(path, data)
    return FileRecord(bytes=len(data), rows=table.num_rows, sha256=hashlib.sha256(data).hexdigest())


def record_of(path: UPath) -> FileRecord:
    """The record of a file as it lies there now; `rows` is 0 where it is not Parquet."""
    data = path.read_bytes()
    rows = pq.ParquetFile(pa.BufferReader(data)).metadata.num_rows if path.suffix == ".parquet" else 0
    return FileRecord(bytes=len(data), rows=rows, sha256=hashlib.sha256(data).hexdigest())


def parts(folder: UPath) -> list[UPath]:
    """The `part-*.parquet` files of a table in order; none where the folder is not there."""
    return [path for path in children(folder) if path.name.startswith("part-") and path.name.endswith(".parquet")]


def children(folder: UPath) -> list[UPath]:
    """What lies in a folder, by name; nothing where the folder is not there. Not by glob: in the URL of an object store
    it takes a folder named run[1] for a pattern.
    """
    return sorted(folder.iterdir(), key=lambda path: path.name) if folder.exists() else []


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def read_table(path: UPath, columns: list[str] | None = None, *, sha256: str | None = None) -> pa.Table:
    """One Parquet file, or all parts of a folder in order. `sha256`: what the one file must have.

    Raises: `DirectoryError` where it has another, or a column is of an Arrow type that some package brings: Ray has one
    whose values are pickles, which whoever wrote the file could make run code here. No table of ours has one.
    """
    files = [path] if path.suffix == ".parquet" else parts(path)
    tables = [
        # By this thread alone: Arrow's let go of the bytes behind the call, and where the process ends just then they
        # abort it, status 134 (apache/arrow#34314).
        pq.read_table(
            pa.BufferReader(content(file, sha256)), columns=columns, use_threads=False, page_checksum_verification=True
        )
        for file in files
    ]
    for file, table in zip(files, tables, strict=True):
        if "extension<" in str(table.schema):
            raise DirectoryError(f"{file} is no plain table: a column is an Arrow extension; make the directory anew")
    return concat(tables)


def content(file: UPath, sha256: str | None) -> bytes:
    """The bytes of a file. Raises: `DirectoryError` where it has not the SHA-256 `sha256`, or is gone."""
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        if sha256 is None:
            raise
        raise DirectoryError(
            f"{file} is gone: its directory is being made anew, or lost it; run again when it is finished"
        ) from error
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise DirectoryError(
            f"{file} is not the file that was written (its SHA-256 differs): restore it, or make its directory anew "
            "with --overwrite"
        )
    return data


def n_rows(path: UPath) -> int:
    """Rows of one Parquet file, from its footer alone."""
    with path.open("rb") as file:
        return int(pq.read_metadata(file).num_rows)


def concat(tables: Iterable[pa.Table]) -> pa.Table:
    tables = list(tables)
    return pa.concat_tables(tables) if tables else pa.table({})


def remove(path: UPath) -> None:
    """Removes a file or a folder with all in it; nothing where it is not there."""
    if path.exists():
        path.fs.rm(path.path, recursive=True)


def as_url(path: UPath) -> str:
    """The path as a string that `locate` takes in any process of the cluster."""
    return str(path.path if is_local(path) else path)
