"""Blocks and commits of a screening, without Ray doing any work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from malaria_ray.runtime import storage
from malaria_ray.stages import ledger


def listing(n: int) -> pa.Table:
    return pa.table({"key": np.arange(n), "image_id": [f"{i}.png" for i in range(n)]})


@pytest.mark.parametrize(
    ("n", "block_rows", "tail_rows", "multiple"),
    [
        (1, 64, 256, 64),
        (1000, 64, 256, 64),
        (1000, 64, 0, 64),  # no tail but the last rows, that make no whole block
        (200_000, 1024, 4096, 64),  # more than a page
        (200_000, 1022, 4088, 7),  # pages that are no multiple of a block
    ],
)
def test_each_row_is_in_one_block_and_blocks_are_whole_batches(
    tmp_path: Path, n: int, block_rows: int, tail_rows: int, multiple: int
):
    blocks = ledger.write_blocks(
        listing(n), storage.locate(str(tmp_path)), block_rows=block_rows, tail_rows=tail_rows, multiple=multiple
    )
    tasks = ledger.BlockSource(blocks).get_read_tasks(len(blocks))
    tables = [table for task in tasks for table in task()]
    assert [table.num_rows for table in tables] == [block.n_rows for block in blocks]
    assert pa.concat_tables(tables)["key"].to_pylist() == list(range(n))
    sizes = [block.n_rows for block in blocks]
    assert max(sizes) <= block_rows
    n_pages = len({block.page for block in blocks})
    assert sum(size % multiple > 0 for size in sizes) <= n_pages, (
        "only the last block of a page may be no whole batches"
    )


def test_only_what_is_committed_is_done(tmp_path: Path):
    """A writer killed in the middle leaves half a file and a pending note; one killed just before the commit a whole
    file and a pending note.
    """
    work = storage.locate(str(tmp_path))
    assert not len(ledger.keys_done(work))
    for name, keys in (("a_000000_000000", [3, 1]), ("a_000001_000000", [2]), ("a_000001_000001", [7])):
        ledger.reopen(work, pa.table({"key": keys}), name)
    for name, data in (("a_000002_000000", b"PAR1 half"), ("a_000003_000000", None)):
        file = tmp_path / "scored" / f"{name}-0.parquet"
        if data is None:
            pq.write_table(pa.table({"key": [9]}), file)
        else:
            file.write_bytes(data)
        pq.write_table(pa.table({"key": [9]}), tmp_path / "checkpoint" / f"{name}.pending.parquet")
    assert sorted(ledger.keys_done(work)) == [1, 2, 3, 7]
    assert sorted(ledger.committed_files(work)) == ["a_000000_000000", "a_000001_000000", "a_000001_000001"]
