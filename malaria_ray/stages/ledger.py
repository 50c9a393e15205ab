"""What of a screening is done and what is left. No stage: no `run`.

Ray Data's checkpoint is the ledger: a write task notes the keys of its rows as pending, writes them, and renames the
note. A row is done where its note is committed. Here the ledger is read, and what is left is handed to Ray:

    _work/listing/part-*.parquet   what was left when this run began; one row group a block
    _work/scored/<name>-*.parquet     rows that were scored, written by Ray
    _work/checkpoint/<name>.parquet   their keys, committed; <name>.pending.parquet before

Finished rows are left out when the blocks are made and not by Ray's filter: that one is an actor of a whole CPU and
1 GiB, for which a small machine whose CPUs score has no room (it would wait for ever on one CPU).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.data.checkpoint.checkpoint_filter import IdColumnCheckpointManager
from ray.data.datasource import Datasource, ReadTask
from upath import UPath

from malaria_ray.runtime import storage

_PAGE_ROWS = 65_536  # of the listing in one file
_N_THREADS = 16  # small files read at a time: what is waited for is the network
_PENDING = ".pending.parquet"

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """One row group of a page of the listing: what an actor takes at a time, and at most loses when it is killed."""

    page: str
    group: int
    n_rows: int


def committed_files(work: UPath) -> dict[str, UPath]:
    """The files of rows that are done, by the name of their commit; what a killed writer left is none of them."""
    if not (work / "checkpoint").exists():
        return {}
    notes = [file.name for file in (work / "checkpoint").iterdir() if file.name.endswith(".parquet")]
    names = {name.removesuffix(".parquet") for name in notes if not name.endswith(_PENDING)}
    found: dict[str, UPath] = {}
    for file in (work / "scored").iterdir() if names else ():
        name = file.name.removesuffix(".parquet").rpartition("-")[0]  # Ray numbers the files of one task: …-0.parquet
        if name in names:
            found[name] = file
    return found


def read_files(files: Iterable[UPath], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The tables of many small files, some read at a time."""
    read: Callable[[UPath], pa.Table] = partial(storage.read_table, columns=columns)
    yield from _mapped(read, list(files))


def keys_done(work: UPath) -> npt.NDArray[np.int64]:
    """Keys of all rows that are done, as often as they stand there."""
    tables = read_files(committed_files(work).values(), ["key"])
    return np.concatenate([np.empty(0, np.int64), *(table["key"].to_numpy() for table in tables)])


def write_blocks(listing: pa.Table, work: UPath, *, block_rows: int, tail_rows: int, multiple: int) -> list[Block]:
    """Writes the rows to score as blocks of `block_rows`; the last `tail_rows` as blocks of a quarter, so that all
    actors end at about the same time. A block is a multiple of `multiple` rows, but for the last of each kind.
    """
    storage.remove(work / "listing")
    blocks: list[Block] = []
    n_bulk = max(0, listing.num_rows - tail_rows) // block_rows * block_rows
    small = max(multiple, block_rows // 4 // multiple * multiple)
    parts = [(start, min(_PAGE_ROWS, n_bulk - start), block_rows) for start in range(0, n_bulk, _PAGE_ROWS)]
    for index, (start, n, rows) in enumerate([*parts, (n_bulk, listing.num_rows - n_bulk, small)]):
        page = work / "listing" / storage.part_name(index)
        storage.write_table(page, listing.slice(start, n), row_group_rows=rows)
        url = storage.as_url(page)
        blocks += [Block(url, group, min(rows, n - at)) for group, at in enumerate(range(0, n, rows))]
    return blocks


class BlockSource(Datasource):  # type: ignore[misc]  # Ray gives no types
    """The blocks as a source of Ray Data: one task a block, which reads its own row group. Ray's Parquet reader would
    open every file first to guess sizes, and join small ones to blocks of its own.
    """

    def __init__(self, blocks: list[Block]):
        super().__init__()
        self._blocks = blocks

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        return [
            ReadTask(partial(_read_block, block), BlockMetadata(block.n_rows, None, None, None))
            for block in self._blocks
        ]


class LedgerOfSource(IdColumnCheckpointManager):  # type: ignore[misc]
    """Ray's manager without its filter: the source holds only rows that are left. Files of pending notes are deleted as
    ever, but for those whose note was committed: an object store renames by copying and deleting, and a writer that was
    stopped between the two leaves both notes, for which Ray would delete rows that are done.
    """

    def load_checkpoint(
        self, data_file_dir: str | None = None, data_file_filesystem: pa.fs.FileSystem | None = None
    ) -> tuple[ray.ObjectRef | None, int]:
        selector = pa.fs.FileSelector(self.checkpoint_path_unwrapped, allow_not_found=True)
        notes = {note.path for note in self.filesystem.get_file_info(selector)}
        for note in notes:
            if note.endswith(_PENDING) and note.removesuffix(_PENDING) + ".parquet" in notes:
                self.filesystem.delete_file(note)
        self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        return None, 0


def checkpoint_of(work: UPath) -> CheckpointConfig:
    filesystem, root = storage.arrow_filesystem(work)
    return CheckpointConfig(
        id_column="key",
        checkpoint_path=f"{root}/checkpoint",
        override_filesystem=filesystem,
        delete_checkpoint_on_success=False,  # publishing still needs to know what is done, should it be killed
        checkpoint_manager_cls=LedgerOfSource,
    )


def reopen(work: UPath, rows: pa.Table, name: str = "reopened") -> None:
    """Writes rows that are done already, as a write task of Ray would have."""
    storage.write_table(work / "scored" / f"{name}-0.parquet", rows)
    storage.write_table(work / "checkpoint" / f"{name}.parquet", rows.select(["key"]))


def forget(work: UPath, image_ids: pa.Array) -> None:
    """Marks rows as not done, file by file. Killed between, some may stay done or stand twice; none is lost."""
    for name, file in committed_files(work).items():
        rows = storage.read_table(file)
        kept = rows.filter(pc.invert(pc.is_in(rows["image_id"], value_set=image_ids)))
        if kept.num_rows < rows.num_rows:
            reopen(work, kept, f"kept_{secrets.token_hex(8)}")
            storage.remove(work / "checkpoint" / f"{name}.parquet")
            storage.remove(file)


def _read_block(block: Block) -> list[pa.Table]:
    with storage.locate(block.page).open("rb") as file:
        return [pq.ParquetFile(file).read_row_group(block.group)]


def _mapped(function: Callable[[Any], T], items: list[Any]) -> Iterator[T]:
    """In order, with at most `_N_THREADS` results waiting to be taken."""
    with ThreadPoolExecutor(_N_THREADS) as pool:
        for start in range(0, len(items), _N_THREADS):
            yield from pool.map(function, items[start : start + _N_THREADS])
