"""Where cells come from: `open_archive(url)` finds the kind, `list_archive` what is in it, `read_cells` the pixels.

Every kind reduces a file to a place: container, offset, span and packing method (`schema.LISTING`). Listing is the
only thing that
differs between kinds; reading needs the places alone, so any process can read any part of an archive by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pyarrow as pa
from upath import UPath

from malaria_ray.archives.containers import State
from malaria_ray.errors import ArchiveError
from malaria_ray.runtime import outputs, storage

_ALLOWED = (
    "an archive is a folder of images or shards, a .zip, .tar or .parquet file, or a directory made by "
    "'malaria-ray ingest' or 'pack'"
)


class Archive(Protocol):
    """One archive. `places()` yields tables with the columns of `schema.LISTING` that the kind knows. `states`: of each
    file that holds many, by its URL, the state that it was in before it was listed.
    """

    url: str
    states: dict[str, State]

    def identity(self) -> dict[str, Any]:
        """What tells, without listing, that this is still the same archive; JSON values."""

    def places(self) -> Iterator[pa.Table]:
        """The files of the archive, in any order, a bounded number at a time."""


def open_archive(url: str) -> Archive:
    """The archive at a local path or fsspec URL: a folder of images or shards, a .zip, .tar or .parquet, a dataset made
    by `ingest`, what `pack` made, or `nih`.

    Raises: `ArchiveError` where nothing is there or its kind is unknown, `ConfigError` for an unknown protocol.
    """
    from malaria_ray.archives import containers
    from malaria_ray.archives.datasets import DatasetArchive
    from malaria_ray.archives.folders import FolderArchive
    from malaria_ray.archives.nih import nih_archive
    from malaria_ray.archives.parquets import PackedArchive, ParquetArchive
    from malaria_ray.archives.tars import COMPRESSED, TarArchive
    from malaria_ray.archives.zips import ZipArchive

    if url == "nih":
        return nih_archive()
    path = storage.locate(url)
    name = containers.name_of(path).lower()
    kinds = {".zip": ZipArchive, ".tar": TarArchive, ".parquet": ParquetArchive, **dict.fromkeys(COMPRESSED)}
    ending = next((ending for ending in kinds if name.endswith(ending)), None)
    if ending and not _is_folder(path, url):
        if kind := kinds[ending]:
            return kind(path)
        raise ArchiveError(
            f"{url} is compressed as a whole: no part of it can be read without all before; unpack it to a folder "
            "or a plain .tar (images are compressed already)"
        )
    try:
        is_there, is_folder = path.exists(), path.is_dir()
    except Exception as error:  # object stores' clients raise kinds of their own, botocore's NoCredentialsError say
        raise ArchiveError(f"{url} cannot be looked at: {error}; check the address and your permissions") from error
    if not is_there:
        raise ArchiveError(f"{url} is not there; {_ALLOWED}")
    if not is_folder:
        raise ArchiveError(f"{url} is a file of an unknown kind; {_ALLOWED}")
    stages: dict[str | None, Callable[[UPath], Archive]] = {
        "ingest": DatasetArchive,
        "pack": PackedArchive,
        None: FolderArchive,
    }
    stage = outputs.stage_of(path)
    if stage not in stages:
        raise ArchiveError(f"{url} was made by 'malaria-ray {stage}' and its pictures are no cells; {_ALLOWED}")
    return stages[stage](path)


def _is_folder(path: UPath, url: str) -> bool:
    """Whether a folder has a name like a file's. On the web a slash tells: looking would read the file."""
    if storage.is_local(path):
        return path.is_dir()
    if url.endswith("/") or storage.is_web(path):
        return url.endswith("/")
    try:
        return bool(path.fs.info(path.path)["type"] == "directory")
    except Exception:  # what cannot be looked at is told of by whoever reads it
        return False
