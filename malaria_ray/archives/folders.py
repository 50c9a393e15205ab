"""A folder of image files, on a disk or behind a URL that can be listed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from upath import UPath

from malaria_ray.errors import ArchiveError
from malaria_ray.runtime import storage

_BATCH = 10_000
_KIND, _OTHER = {"file": "file", "directory": "a folder"}, "a pipe or device"


class FolderArchive:
    """All files below a folder; `image_id` is the path below it."""

    def __init__(self, path: UPath):
        self.path = path
        self.url = str(path)

    def identity(self) -> dict[str, Any]:
        return {"archive": self.url}

    def places(self) -> Iterator[pa.Table]:
        batch: list[tuple[str, int, str]] = []
        for name, info in self._files():
            method = self._method(info)
            try:
                name.encode()
            except UnicodeEncodeError:  # a disk takes any bytes for a name, a table of strings does not
                name, method = name.encode("utf-8", "backslashreplace").decode(), "a file whose name is not UTF-8"
            batch.append((name, int(info.get("size") or 0), method))
            if len(batch) == _BATCH:
                yield self._table(batch)
                batch = []
        if batch:
            yield self._table(batch)

    def _files(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(path below the root, what fsspec tells) of all that is no folder.

        Raises: `ArchiveError` where a folder cannot be listed; `fs.walk` would leave out its files without a word.
        """
        root = self.path.path.rstrip("/")
        waiting = [root]
        while waiting:
            folder = waiting.pop()
            try:
                found = self.path.fs.ls(folder or "/", detail=True)
            except Exception as error:  # object stores' clients raise kinds of their own
                raise ArchiveError(f"{folder or '/'} cannot be listed: {error}; check that it can be read") from error
            for info in found:
                name: str = info["name"]
                is_itself = name.rstrip("/") == folder.rstrip("/")
                if info["type"] == "directory" and not is_itself:
                    waiting.append(name.rstrip("/"))
                    continue
                is_marker = is_itself and info["type"] == "file" and not info.get("size")
                if not is_marker:  # an object store's empty object that stands for the folder
                    yield name[len(root) :].lstrip("/"), info

    def _method(self, info: dict[str, Any]) -> str:
        """`file`, or what it is instead. Only `file` is ever opened: reading a pipe would wait for ever."""
        if not info.get("islink"):
            return _KIND.get(info["type"], _OTHER)
        try:
            target = self.path.fs.info(info["name"])["type"]
        except OSError:
            return "a broken link"
        return "file" if target == "file" else f"a link to {_KIND.get(target, _OTHER)}"

    def _table(self, batch: list[tuple[str, int, str]]) -> pa.Table:
        names, sizes, methods = zip(*batch, strict=True)
        return pa.table(
            {
                "image_id": pa.array(names, pa.string()),
                "n_bytes": pa.array(sizes, pa.int64()),
                "container": pa.repeat(storage.as_url(self.path), len(names)),
                "method": pa.array(methods, pa.string()),
            }
        )
