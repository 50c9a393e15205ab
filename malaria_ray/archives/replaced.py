"""Files of many images that are replaced while an output is made of them: their places are then those of other images.

What state each tar, zip or Parquet file is in is kept in the output's work folder before anything is read, and looked
at behind it. Of one that is another then, or when a later run goes on, what is done holds only where the same bytes
still lie under the same name: that is compared, so that a file that was merely copied or touched costs no work.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
from upath import UPath

from malaria_ray.archives import Archive, containers
from malaria_ray.archives.containers import State
from malaria_ray.archives.listing import shards
from malaria_ray.archives.reading import read_files
from malaria_ray.cells.images import content_digest
from malaria_ray.errors import ArchiveError
from malaria_ray.runtime import storage
from malaria_ray.runtime.redaction import without_secrets

log = logging.getLogger("malaria_ray")

_STATES = "containers.json"
_DONE = pa.schema([("image_id", pa.string()), ("content_digest", pa.string())])
_N_THREADS = 8  # of an object store each waits; on a disk SHA-256 lets the others run
_AT_ONCE = 1024  # files


def forget_replaced(
    work: UPath,
    archive: Archive,
    files: pa.Table,
    *,
    done: Callable[[], Iterable[pa.Table]],
    forget: Callable[[pa.Table], None],
) -> None:
    """Before a run reads: makes undone what earlier ones made of files that are others now.

    `files`: the listing; `done`: gives image_id and content_digest of what is done; `forget`: makes these rows of the
    listing undone. Killed before its end, the next run does it again.
    """
    kept, now = work / _STATES, _named(archive.states)
    was = storage.read_json(kept) if kept.exists() else now
    replaced = [url for url in archive.states if was.get(without_secrets(url)) != now[without_secrets(url)]]
    if replaced:
        known = pa.concat_tables([_DONE.empty_table(), *(table.select(_DONE.names).cast(_DONE) for table in done())])
        rows = files.filter(_lie_in(files["container"], replaced))
        rows = rows.filter(pc.is_in(rows["image_id"], value_set=known["image_id"]))
        log.info(
            "%s replaced since the work was begun: the %s files that were read are compared with what is there now",
            f"{storage.locate(replaced[0])} was" if len(replaced) == 1 else f"{len(replaced):,} files were",
            f"{rows.num_rows:,}",
        )
        with ThreadPoolExecutor(_N_THREADS) as pool:
            digests = pa.chunked_array(pool.map(_digests, shards(rows, _AT_ONCE)), pa.string())
        at = pc.index_in(known["image_id"], value_set=rows["image_id"])
        is_same = pc.or_(pc.is_null(at), pc.fill_null(pc.equal(known["content_digest"], digests.take(at)), False))
        others = pc.unique(known["image_id"].filter(pc.invert(is_same)))
        if len(others):
            log.info("%s of them are others now and are read again", f"{len(others):,}")
            forget(rows.filter(pc.is_in(rows["image_id"], value_set=others)))
    if replaced or not kept.exists():
        keep_states(work, archive.states)


def check_unchanged(work: UPath, archive: Archive, files: pa.Table) -> None:
    """Behind reading: the listing's containers of many files must be those that were listed.

    Raises: `ArchiveError` where one is not, or cannot be looked at. The next run compares all that is done then, even
    where the file is back that was there first.
    """
    many = pc.unique(files["container"].filter(pc.is_valid(files["offset"]))).to_pylist()
    try:
        now = containers.states([storage.locate(url) for url in many]).values()
        for url, state in zip(many, now, strict=True):
            if archive.states[url] != state:
                raise ArchiveError(
                    f"{storage.locate(url)} was replaced while it was read; run again: that keeps what was read of "
                    "bytes that are still there, and says so where other files lie in it"
                )
    except ArchiveError:
        keep_states(work, {})
        raise


def keep_states(work: UPath, states: dict[str, State]) -> None:
    """What the next run compares the containers with; of those that are not among them it compares all that is done."""
    storage.write_json(work / _STATES, _named(states))


def states_digest(states: dict[str, State]) -> str:
    """First 16 hex digits of a SHA-256 over the states of the containers that were listed."""
    return hashlib.sha256(json.dumps(_named(states), sort_keys=True).encode()).hexdigest()[:16]


def _named(states: dict[str, State]) -> dict[str, State]:
    """As they are written: a signed URL opens the archive to whoever knows it, and may be signed anew."""
    return {without_secrets(url): state for url, state in states.items()}


def _lie_in(column: pa.ChunkedArray, urls: list[str]) -> pa.ChunkedArray:
    """Whether the container, dictionary encoded, is one of some."""
    value_set = pa.array(urls, pa.string())
    return pa.chunked_array(
        [pc.is_in(chunk.dictionary, value_set=value_set).take(chunk.indices) for chunk in column.chunks], pa.bool_()
    )


def _digests(rows: pa.Table) -> pa.Array:
    """The content_digest of what lies at each place now; null where it is not to be had."""
    if rows["method"][0].as_py() != "crops":
        contents = read_files(rows)
        return pa.array([content_digest(data) if isinstance(data, bytes) else None for data in contents], pa.string())
    found = []
    for url in pc.unique(rows["container"]).to_pylist():  # as read_cells: rows are in order of the parts
        offsets = rows.filter(pc.equal(rows["container"], url))["offset"]
        column = storage.read_table(storage.locate(url), ["content_digest"])["content_digest"]
        found += column.take(pc.if_else(pc.less(offsets, len(column)), offsets, None)).to_pylist()
    return pa.array(found, pa.string())
