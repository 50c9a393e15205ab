"""A folder of image files, on a disk or behind a URL that can be listed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from upath import UPath

from malaria_ray.errors import ArchiveError
from malaria_ray.runtime import storage

_BATCH = 10_000


class FolderArchive:
    """All files below a folder; `image_id` is the path below it."""

    def __init__(self, path: UPath):
        self.path = path
        self.url = str(path)

    def identity(self) -> dict[str, Any]:
        return {"archive": self.url}

    def places(self) -> Iterator[pa.Table]:
        root = self.path.path.rstrip("/")
        batch: list[tuple[str, int, str]] = []
        for folder, _, files in self.path.fs.walk(root, detail=True):
            inside = str(folder)[len(root) :].strip("/")
            for name, info in files.items():
                if info["name"].rstrip("/") == root:  # object stores list the folder's own marker
                    continue
                # Reading a pipe or a device would wait for ever, so only the method 'file' is ever opened.
                method = "file" if info["type"] == "file" else str(info["type"])
                batch.append((f"{inside}/{name}" if inside else name, int(info.get("size") or 0), method))
                if len(batch) == _BATCH:
                    yield self._table(batch)
                    batch = []
        if batch:
            yield self._table(batch)

    def _table(self, batch: list[tuple[str, int, str]]) -> pa.Table:
        names, sizes, methods = zip(*batch, strict=True)
        try:
            image_ids = pa.array(names, pa.string())
        except UnicodeEncodeError as error:
            name = next(name for name in names if not name.isprintable())
            raise ArchiveError(f"{self.url}: the file name {name!r} is not valid UTF-8; rename it") from error
        return pa.table(
            {
                "image_id": image_ids,
                "n_bytes": pa.array(sizes, pa.int64()),
                "container": pa.repeat(storage.as_url(self.path), len(names)),
                "method": pa.array(methods, pa.string()),
            }
        )
