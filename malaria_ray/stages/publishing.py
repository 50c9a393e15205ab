"""The ledger's rows become `predictions/` and `quarantine/`, in order and each once; `reopen` makes them rows again."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from malaria_ray.archives.containers import State
from malaria_ray.archives.listing import try_again
from malaria_ray.archives.replaced import keep_states
from malaria_ray.errors import ArchiveError, InvariantError
from malaria_ray.runtime import outputs, storage
from malaria_ray.runtime.storage import FileRecord
from malaria_ray.schema import OK, PREDICTIONS, QUARANTINE, Reason, Table
from malaria_ray.stages import ledger

log = logging.getLogger("malaria_ray")

_PART_ROWS = 250_000  # of a published file: what the driver holds at a time
_DERIVED = ("metrics", "curves", "patients", "review", "differences", "report", "catalog.sql", "croissant.json")
SORTED_BY = ("patient_id", "image_id")
_SORT_MEMORY = "512MB"  # of the driver's, for sorting; the rest goes to disk

SCORED = pa.schema(
    [column.field().remove_metadata() for column in PREDICTIONS.columns]
    + [
        ("key", pa.int64()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("n_bytes", pa.int64()),
        ("read_s", pa.float32()),
        ("score_s", pa.float32()),
        ("scored_at", pa.float64()),
        ("engine", pa.string()),
    ]
)
"""One row for each file of the archive, before they are parted into predictions and quarantine."""


@contextmanager
def scored_rows(results: UPath, n_files: int) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with all scored rows in the table `scored`, which lies on disk where it is large.

    Raises: `InvariantError` unless they are the listing's, each exactly once.
    """
    files = ledger.committed_files(outputs.work_of(results, "screen"))
    tables: Iterator[pa.Table] = ledger.read_files([files[name] for name in sorted(files)])
    batches = (batch for table in tables for batch in table.select(SCORED.names).cast(SCORED).to_batches())
    with tempfile.TemporaryDirectory(prefix="malaria_ray-") as folder, duckdb.connect(f"{folder}/scored.db") as rows:
        rows.execute(f"SET memory_limit = '{_SORT_MEMORY}'; SET temp_directory = '{folder}'; SET TimeZone = 'UTC'")
        rows.register("stream", pa.RecordBatchReader.from_batches(SCORED, batches))
        rows.execute("CREATE TABLE scored AS SELECT * FROM stream")
        rows.unregister("stream")
        n_rows, *found = _one(rows, "SELECT count(*), count(DISTINCT key), min(key), max(key) FROM scored")
        if found != [n_files, 0, n_files - 1]:
            raise InvariantError(
                f"{n_rows:,} rows were scored of {n_files:,} files, {found[0]:,} of them different; {results} is not "
                "published: keep it and report this"
            )
        if n_rows > n_files:  # the workers of a killed driver, or of a node cut off, wrote on while this run scored
            log.info("%s files were scored twice; the first row of each is kept", f"{n_rows - n_files:,}")
            rows.execute("CREATE TABLE once AS SELECT DISTINCT ON (key) * FROM scored ORDER BY key, scored_at")
            rows.execute("DROP TABLE scored; ALTER TABLE once RENAME TO scored")
        with (results / "listing.parquet").open("rb") as file:
            listed = pq.ParquetFile(file)
            schema = pa.schema([listed.schema_arrow.field(name) for name in ("key", "image_id")])
            batches = listed.iter_batches(columns=schema.names)
            rows.register("listing", pa.RecordBatchReader.from_batches(schema, batches))
            [n_same] = _one(rows, "SELECT count(*) FROM listing JOIN scored USING (key, image_id)")
            rows.unregister("listing")
        if n_same != n_files:
            raise InvariantError(
                f"{n_files - n_same:,} of {n_files:,} rows have another name than the listing; {results} is not "
                "published: the archive was changed while it was read, --overwrite begins again"
            )
        yield rows


def publish(rows: duckdb.DuckDBPyConnection, results: UPath) -> dict[str, FileRecord]:
    """Writes predictions/ and quarantine/, sorted by patient and image, in few files.

    Removes what was made from predictions that are published anew: those of finished results that were opened again.
    """
    for path in (results / name for name in _DERIVED):
        if path.exists():
            log.info("%s told of the predictions before and is removed; make it again", path)
            storage.remove(path)
    reasons = f"SELECT *, 'screen' AS stage, status AS reason FROM scored WHERE status != '{OK}'"
    return {
        **_publish_table(rows, f"SELECT * FROM scored WHERE status = '{OK}'", results, PREDICTIONS),
        **_publish_table(rows, reasons, results, QUARANTINE),
    }


def _publish_table(rows: duckdb.DuckDBPyConnection, query: str, results: UPath, table: Table) -> dict[str, FileRecord]:
    storage.remove(results / table.name)  # a killed earlier attempt at publishing may have left more parts
    schema, files = table.arrow_schema(), dict[str, FileRecord]()
    columns = ", ".join(table.names)
    ordered = f"SELECT {columns} FROM ({query}) ORDER BY {SORTED_BY[0]} NULLS LAST, {SORTED_BY[1]}"
    for part in _parts(rows.sql(ordered).to_arrow_reader(_PART_ROWS // 10), _PART_ROWS):
        name = f"{table.name}/{storage.part_name(len(files))}"
        files |= outputs.write_table(results, name, part.cast(schema), stage="screen", sorted_by=SORTED_BY)
    return files


def _parts(batches: pa.RecordBatchReader, n_rows: int) -> Iterator[pa.Table]:
    """The rows in tables of `n_rows`; one without rows where there are none."""
    waiting = batches.schema.empty_table()
    is_first = True
    for batch in batches:
        waiting = pa.concat_tables([waiting, pa.table(batch)])
        while waiting.num_rows >= n_rows:
            yield waiting.slice(0, n_rows)
            waiting, is_first = waiting.slice(n_rows), False
    if waiting.num_rows or is_first:
        yield waiting


def counts_of(rows: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """What `_SUCCESS.json` counts."""
    by_status = dict(rows.execute("SELECT status, count(*) FROM scored GROUP BY status").fetchall())
    n_scored = by_status.pop(OK, 0)
    [n_called] = _one(rows, "SELECT coalesce(sum(predicted_label), 0)::BIGINT FROM scored")
    return {
        "n_files": n_scored + sum(by_status.values()),
        "n_scored": n_scored,
        "n_quarantined": sum(by_status.values()),
        "quarantine_reasons": dict(Counter(by_status).most_common()),
        "n_called_parasitized": n_called,
    }


def rates_of(rows: duckdb.DuckDBPyConnection, *, since: float, seconds: float, n_actors: int) -> dict[str, Any]:
    """How fast each stage was, of the images scored now.

    `alone`: the rate that the actors would reach did they nothing else, from the seconds that they spent in it. The
    ceiling is 1 / (1/read + 1/score). `steady` leaves out the first and last tenth of the images.
    """
    n, first, read_s, score_s, low, high = _one(
        rows,
        """SELECT count(*), min(scored_at), sum(read_s::DOUBLE), sum(score_s::DOUBLE),
                  quantile_disc(scored_at, 0.1), quantile_disc(scored_at, 0.9) FROM scored WHERE scored_at >= $1""",
        since,
    )
    if not n:  # the clocks of the nodes differ by more than the run took
        return {}
    by_engine = rows.execute("SELECT engine, count(*) FROM scored WHERE scored_at >= $1 GROUP BY ALL", [since])
    engines = dict(by_engine.fetchall())
    [n_steady] = _one(rows, "SELECT count(*) FROM scored WHERE scored_at > $1 AND scored_at <= $2", low, high)
    [begun] = _one(
        rows,
        """SELECT min(scored_at - spent) FROM (SELECT scored_at, sum(read_s::DOUBLE + score_s) AS spent FROM scored
           WHERE scored_at >= $1 GROUP BY scored_at)""",
        since,
    )
    ceiling = n_actors * n / max(read_s + score_s, 1e-9)
    steady = n_steady / (high - low) if high > low else n / seconds
    stages = {
        name: {
            "alone_images_per_second": round(n_actors * n / max(spent, 1e-9), 1),
            "percent_of_it_reached": round(100 * n / seconds / (n_actors * n / max(spent, 1e-9)), 1),
        }
        for name, spent in (("read_and_decode", read_s), ("score", score_s))
    }
    return {
        "first_block_begun_s": round(begun - since, 2),
        "first_image_scored_s": round(first - since, 2),
        "steady_images_per_second": round(steady, 1),
        "ceiling_images_per_second": round(ceiling, 1),
        "percent_of_ceiling": round(100 * n / seconds / ceiling, 1),
        "steady_percent_of_ceiling": round(100 * steady / ceiling, 1),
        "engines": engines,
        "stages": stages,
    }


def to_retry(
    results: UPath, which: Literal["unreadable", "all"] | None, finished: dict[str, Any] | None
) -> pa.ChunkedArray | None:
    """Names of the quarantined files to try again; None where there are none. `finished`: the `_SUCCESS.json` of
    finished results.
    """
    if which is None:
        return None
    if finished is not None:
        found = outputs.read_folder(results, finished, "quarantine", ["image_id", "reason"])
    else:
        files = ledger.committed_files(outputs.work_of(results, "screen")).values()
        tables = ledger.read_files(files, ["image_id", "status"])
        bad = [rows.filter(pc.not_equal(rows["status"], OK)).rename_columns(["image_id", "reason"]) for rows in tables]
        if not bad:
            return None
        found = pa.concat_tables(bad)
    again = found if which == "all" else found.filter(pc.equal(found["reason"], Reason.UNREADABLE.value))
    if not again.num_rows:
        log.info("%s: no quarantined file to try again (%d of other reasons)", results, found.num_rows)
        return None
    log.info("%s: %s quarantined files are tried again", results, f"{again.num_rows:,}")
    return pa.chunked_array([pc.unique(again["image_id"])])


def reopen(
    results: UPath,
    retried: pa.ChunkedArray,
    listing: pa.Table,
    *,
    finished: dict[str, Any] | None,
    states: dict[str, State],
) -> None:
    """Marks the rows of these files as not done, and opens finished results again. `finished`: as in `to_retry`;
    `states`: of the containers that the finished results tell of, as far as they are known.

    The one moment at which anything changes for a reader is the removal of `_SUCCESS.json`: killed before it, the
    results are as they were; after it, the same command, or one without the flag, finishes them.
    Raises: `ArchiveError` where other files have changed too, `DirectoryError` where a part is not the one that was
    published; the results are then as they were.
    """
    work, was = outputs.work_of(results, "screen"), storage.read_table(results / "listing.parquet")
    if finished is None:
        try_again(work, retried, was=was, now=listing)
        ledger.forget(work, retried.combine_chunks())
        return
    published = {name: outputs.read_folder(results, finished, name) for name in ("predictions", "quarantine")}
    storage.remove(work)
    try:
        try_again(work, retried, was=was, now=listing)
    except ArchiveError:
        storage.remove(work)
        raise
    with duckdb.connect() as tables:
        for name, table in published.items():
            tables.register(name, table)
        tables.register("listing", was)
        tables.register("retried", pa.table({"image_id": retried}))
        usable = ", ".join(f"predictions.{name}" for name in PREDICTIONS.names)
        refused = ", ".join(_of_refused(name) for name in PREDICTIONS.names)
        rows: Any = tables.sql(f"""
            SELECT {usable}, key, '{OK}' AS status, NULL AS detail, n_bytes,
                   0 AS read_s, 0 AS score_s, 0 AS scored_at, NULL AS engine
            FROM predictions JOIN listing USING (image_id)
            UNION ALL
            SELECT {refused}, key, reason, detail, quarantine.n_bytes, 0, 0, 0, NULL
            FROM quarantine JOIN listing USING (image_id) WHERE image_id NOT IN (SELECT image_id FROM retried)
        """).to_arrow_table()
    ledger.reopen(work, rows.select(SCORED.names).cast(SCORED))
    keep_states(work, states)
    storage.remove(results / outputs.SUCCESS)


def _of_refused(name: str) -> str:
    """The column of `SCORED` for a file in quarantine, of which little is known."""
    known = {"image_id": "image_id", "content_digest": "content_digest", "patient_id": "patient_id", "label": "label"}
    return known.get(name, "NULL") + f" AS {name}"


def _one(rows: duckdb.DuckDBPyConnection, query: str, *parameters: Any) -> tuple[Any, ...]:
    """The one row that a query gives. Fetched whole: DuckDB takes no other query before the end of one."""
    [row] = rows.execute(query, parameters).fetchall()
    return row
