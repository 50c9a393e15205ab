"""A folder of image files, of tar shards or of Parquet files, on a disk or behind a URL that can be listed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import pyarrow as pa
from upath import UPath

from malaria_ray.archives import containers
from malaria_ray.archives.parquets import is_parquet_of_images, parquet_places, without_ending
from malaria_ray.archives.tars import tar_places
from malaria_ray.errors import ArchiveError
from malaria_ray.runtime import storage

_BATCH = 10_000
_N_THREADS = 16  # folders listed and shards opened at a time: what is waited for is the disk or the network
_KIND, _OTHER = {"file": "file", "directory": "a folder"}, "a pipe or device"

_Row = tuple[str, int | None, str]  # name below the root, size if it is known, method
_Listed = tuple[list[pa.Table], list[_Row], list[str], list[_Row]]  # tables, other files, folders, shards


class FolderArchive:
    """All files below a folder; `image_id` is the path below it.

    A file named `….tar`, or `….parquet` with a column of encoded images, is a shard: its members or rows are listed in
    its place, under their own names.
    """

    def __init__(self, path: UPath):
        self.path = path
        self.url = str(path)
        self.states: dict[str, containers.State] = {}

    def identity(self) -> dict[str, Any]:
        return {"archive": self.url}

    def places(self) -> Iterator[pa.Table]:
        folders, shards, rest = deque([self._root()]), deque[_Row](), list[_Row]()
        running: set[Future[_Listed]] = set()
        with ThreadPoolExecutor(_N_THREADS) as pool:
            while folders or shards or running:
                while len(running) < 2 * _N_THREADS and (folders or shards):
                    if shards:
                        running.add(pool.submit(self._open_shard, shards.popleft()))
                    else:
                        running.add(pool.submit(self._list, folders.popleft()))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                while done:
                    tables, files, more_folders, more_shards = done.pop().result()
                    folders.extend(more_folders)
                    shards.extend(more_shards)
                    while tables:  # none is held longer than it is needed
                        yield tables.pop()
                    rest += files
                    while len(rest) >= _BATCH:
                        yield self._table(rest[:_BATCH])
                        del rest[:_BATCH]
        if rest:
            yield self._table(rest)

    def _root(self) -> str:
        return str(self.path.path).rstrip("/")

    def _list(self, folder: str) -> _Listed:
        """One folder, without those below it: whole batches of its files, the rest of them, its folders, its shards.

        Raises: `ArchiveError` where it cannot be listed; `fs.walk` would leave out its files without a word.
        """
        tables, files, folders, shards = list[pa.Table](), list[_Row](), list[str](), list[_Row]()
        n_root = len(self._root())
        try:
            for info in self._entries(folder):
                name: str = info["name"]
                if info["type"] == "directory":
                    folders.append(name)
                    continue
                if name.rstrip("/") == folder.rstrip("/") and not info.get("size"):
                    continue  # an object store's empty object that stands for the folder
                row = self._row(name[n_root:].removeprefix("/"), info)
                (shards if _is_shard(row) else files).append(row)
                if len(files) == _BATCH:
                    tables.append(self._table(files))
                    files = []
        except Exception as error:  # object stores' clients raise kinds of their own
            raise ArchiveError(f"{folder or '/'} cannot be listed: {error}; check that it can be read") from error
        return tables, files, folders, shards

    def _entries(self, folder: str) -> Iterator[dict[str, Any]]:
        """What fsspec tells of each entry, without holding the whole folder where there is a way."""
        fs = self.path.fs
        if storage.is_local(self.path):
            with os.scandir(folder or "/") as entries:
                for entry in entries:
                    yield fs.info(entry)
        elif hasattr(fs, "call_s3"):
            yield from _s3_entries(fs, folder)
        elif storage.is_web(self.path):  # links of a page: also to itself, to sort it, to the one above
            inside = folder.rstrip("/") + "/"
            for info in fs.ls(folder, detail=True):
                if (name := info["name"].removeprefix(inside)) and "?" not in name:
                    yield info
        else:
            for info in fs.ls(folder or "/", detail=True):
                if info["type"] != "directory" or info["name"].rstrip("/") != folder.rstrip("/"):
                    yield info

    def _row(self, name: str, info: dict[str, Any]) -> _Row:
        method = self._method(info)
        try:
            name = storage.name_in_address(name, self.path)
            name.encode()
        except UnicodeDecodeError:  # of an address; it stays as it is
            method = "a file whose name is not UTF-8"
        except UnicodeEncodeError:  # a disk takes any bytes for a name, a table of strings does not
            name, method = name.encode("utf-8", "backslashreplace").decode(), "a file whose name is not UTF-8"
        return name, info.get("size"), method

    def _method(self, info: dict[str, Any]) -> str:
        """`file`, or what it is instead. Only `file` is ever opened: reading a pipe would wait for ever."""
        if not info.get("islink"):
            return _KIND.get(info["type"], _OTHER)
        try:
            target = self.path.fs.info(info["name"])["type"]
        except OSError:
            return "a broken link"
        return "file" if target == "file" else f"a link to {_KIND.get(target, _OTHER)}"

    def _open_shard(self, shard: _Row) -> _Listed:
        name = shard[0]
        path = storage.locate(f"{storage.as_url(self.path).rstrip('/')}/{storage.address_of(name, self.path)}")
        if name.lower().endswith(".tar"):
            return list(containers.listed(path, lambda: tar_places(path), self.states)), [], [], []
        return list(containers.listed(path, lambda: self._rows(path, shard), self.states)), [], [], []

    def _rows(self, path: UPath, shard: _Row) -> Iterator[pa.Table]:
        if is_parquet_of_images(path):
            yield from parquet_places(path, name=without_ending(shard[0]))
        else:  # a table of something else: a row in quarantine like any file that is no image
            yield self._table([shard])

    def _table(self, batch: list[_Row]) -> pa.Table:
        names, sizes, methods = zip(*batch, strict=True)
        return pa.table(
            {
                "image_id": pa.array(names, pa.string()),
                "n_bytes": pa.array(sizes, pa.int64()),
                "container": pa.repeat(storage.as_url(self.path), len(names)),
                "method": pa.array(methods, pa.string()),
            }
        )


def _is_shard(row: _Row) -> bool:
    name, _, method = row
    return method == "file" and name.lower().endswith((".tar", ".parquet"))


def _s3_entries(fs: Any, folder: str) -> Iterator[dict[str, Any]]:
    """One prefix, a page of 1,000 keys at a time: `fs.ls` holds a dictionary of each key until the last has come."""
    bucket, *_ = fs.split_path(folder)
    page: dict[str, Any] = {}
    prefix = f"{folder}/".removeprefix(f"{bucket}/")  # not split_path's key, which lost the end of a/b//c
    while not page or page.get("IsTruncated"):
        token = {"ContinuationToken": page["NextContinuationToken"]} if page else {}
        page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/", **token)
        for found in page.get("CommonPrefixes", ()):
            yield {"name": f"{bucket}/{found['Prefix'].removesuffix('/')}", "type": "directory"}
        for found in page.get("Contents", ()):
            yield {"name": f"{bucket}/{found['Key']}", "type": "file", "size": found["Size"]}
