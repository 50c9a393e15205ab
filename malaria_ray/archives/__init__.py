"""Where cells come from: `open_archive(url)` finds the kind, `list_archive` what is in it, `read_cells` the pixels.

Every kind reduces a file to a place: container, offset, span and packing method (`schema.LISTING`). Listing is the
only thing that
differs between kinds; reading needs the places alone, so any process can read any part of an archive by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pyarrow as pa

from malaria_ray.errors import ArchiveError
from malaria_ray.runtime import outputs, storage


class Archive(Protocol):
    """One archive. `places()` yields tables with the columns of `schema.LISTING` that the kind knows."""

    url: str

    def identity(self) -> dict[str, Any]:
        """What tells, without listing, that this is still the same archive; JSON values."""

    def places(self) -> Iterator[pa.Table]:
        """The files of the archive, in any order, a bounded number at a time."""


def open_archive(url: str) -> Archive:
    """The archive at a local path or fsspec URL: a folder, a .zip, a dataset made by `ingest`, or `nih`.

    Raises: `ArchiveError` where nothing is there or its kind is unknown, `ConfigError` for an unknown protocol.
    """
    from malaria_ray.archives.datasets import DatasetArchive
    from malaria_ray.archives.folders import FolderArchive
    from malaria_ray.archives.nih import nih_archive
    from malaria_ray.archives.zips import ZipArchive

    if url == "nih":
        return nih_archive()
    path = storage.locate(url)
    name = path.name if storage.is_local(path) else path.name.partition("?")[0]  # a signed URL has more behind the name
    if name.lower().endswith(".zip") and not (storage.is_local(path) and path.is_dir()):
        return ZipArchive(path)
    try:
        is_there, is_folder = path.exists(), path.is_dir()
    except Exception as error:  # object stores' clients raise kinds of their own, botocore's NoCredentialsError say
        raise ArchiveError(f"{url} cannot be looked at: {error}; check the address and your permissions") from error
    if not is_there:
        raise ArchiveError(
            f"{url} is not there; an archive is a folder, a .zip file or a dataset made by 'malaria-ray ingest'"
        )
    if not is_folder:
        raise ArchiveError(f"{url} is a file of an unknown kind; allowed are folders, .zip files and datasets")
    return DatasetArchive(path) if outputs.stage_of(path) == "ingest" else FolderArchive(path)
