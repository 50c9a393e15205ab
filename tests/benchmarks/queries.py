"""The example queries and the report on a million predictions of 10,000 patients, against bare DuckDB.

    python -m tests.benchmarks.queries [ROWS [PATIENTS]]        some minutes; prints Markdown, then one line of JSON

Three questions:

1. How much does the layout of a results directory (tables in parts, views over them, no column kept twice) cost? Each
   example query is asked of the directory and of one Parquet file a table, written by DuckDB itself with its defaults,
   which holds all rows of the table in the same order. The SQL is the same, the view `cells` included. The median of
   rounds that take turns; opening the directory (footers, views) is told on its own.
2. What do sorted files save? One patient's cells and one image's row are looked up in the directory and in one whose
   rows were shuffled before they were written by the same writer.
3. How long does `report` take, and how much memory at its peak, in a process of its own? Its pictures are of an archive
   that is gone: at most 300 thumbnails, whatever the number of rows.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))

from results import cells, write_results

from malaria_ray.stages import evaluate, query
from malaria_ray.stages.views import connect, open_results, table_views

N_ROUNDS, PART_ROWS = 5, 250_000
NEEDS_SEVERAL = "-- Needs several results"


def main(n_rows: int = 1_000_000, n_patients: int = 10_000) -> None:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="malaria-ray-queries-") as name:
        folder = Path(name)
        first, second, shuffled = make(folder, n_rows, n_patients)
        said = {
            "rows": n_rows,
            "patients": n_patients,
            "made_s": round(time.monotonic() - begun, 1),
            "queries": queries(folder, first, second),
            "layout": layout(first, shuffled),
            "report": report(first),
        }
    said["total_s"] = round(time.monotonic() - begun, 1)
    print(markdown(said))
    print(json.dumps(said))


def make(folder: Path, n_rows: int, n_patients: int) -> tuple[str, str, str]:
    """Two models' results on the same images, sorted as screening sorts them, and the first's rows shuffled."""
    order = ["patient_id", "image_id"]
    one = cells(n_rows, n_patients=n_patients).sort_values(order, ignore_index=True)
    two = cells(n_rows, n_patients=n_patients, scores_seed=9).sort_values(order, ignore_index=True)
    options = {"archive": folder / "archive", "has_images": False, "part_rows": PART_ROWS}
    first = write_results(folder / "first", one, has_validation=True, **options)
    second = write_results(folder / "second", two, model="vgg19-frozen", **options)
    shuffled = write_results(folder / "shuffled", one.sample(frac=1, random_state=1), **options)
    evaluate.run(evaluate.Config(results=str(first), against=str(second), n_resamples=100))
    return str(first), str(second), str(shuffled)


def queries(folder: Path, first: str, second: str) -> list[dict[str, object]]:
    """Seconds of each example by the directory and by one file a table, and their ratio."""
    opened = {}
    for directories in ((first,), (first, second)):
        begun = time.monotonic()
        ours = connect(open_results(directories))
        seconds = time.monotonic() - begun
        opened[len(directories)] = (ours, in_one_file(ours, folder / f"one-{len(directories)}"), seconds)
    rows: list[dict[str, object]] = []
    for name, sql in query.example_queries().items():
        ours, bare, opening = opened[2 if sql.startswith(NEEDS_SEVERAL) else 1]
        try:
            answers = [run(connection, sql)[1] for connection in (ours, bare)]  # warms both
        except duckdb.CatalogException as error:  # a table that these results do not have
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        pd.testing.assert_frame_equal(*answers, check_dtype=False, rtol=1e-9)
        taken = [(run(ours, sql)[0], run(bare, sql)[0]) for _ in range(N_ROUNDS)]
        ours_s, bare_s = (statistics.median(seconds) for seconds in zip(*taken, strict=True))
        rows.append({"query": name, "opening_s": opening, "ours_s": ours_s, "bare_s": bare_s, "ratio": ours_s / bare_s})
    return rows


def in_one_file(ours: duckdb.DuckDBPyConnection, folder: Path) -> duckdb.DuckDBPyConnection:
    """A DuckDB with the same views over one plain Parquet file a table."""
    folder.mkdir()
    bare = duckdb.connect()
    views = dict(ours.execute("SELECT view_name, sql FROM duckdb_views() WHERE NOT internal").fetchall())
    for name in ("runs", *table_views()):
        if name in views:
            file = folder / f"{name}.parquet"
            ours.execute(f"COPY (FROM {name}) TO '{file}' (FORMAT parquet)")
            bare.execute(f"CREATE VIEW {name} AS FROM read_parquet('{file}')")
    for name, sql in views.items():
        if name not in ("runs", *table_views()):
            bare.execute(sql)
    return bare


def run(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[float, pd.DataFrame]:
    begun = time.monotonic()
    answer = connection.sql(sql).df()
    return time.monotonic() - begun, answer


def layout(in_order: str, shuffled: str) -> list[dict[str, object]]:
    """Look-ups of one patient and one image, and the bytes of the files, sorted and not."""
    sides = [connect(open_results([directory])) for directory in (in_order, shuffled)]
    patients = [row[0] for row in sides[0].execute("SELECT DISTINCT patient_id FROM predictions LIMIT 20").fetchall()]
    rows: list[dict[str, object]] = []
    for what, sql in (
        ("cells of one patient", "SELECT count(*), avg(score) FROM predictions WHERE patient_id = $1"),
        (
            "one image of a patient",
            "SELECT max(score), min(image_id) FROM predictions WHERE patient_id = $1 AND image_id LIKE '%7.png'",
        ),
    ):
        seconds = [statistics.median(timed(one, sql, patient) for patient in patients) for one in sides]
        rows.append({"what": what, "sorted": seconds[0], "shuffled": seconds[1], "unit": "s"})
    sizes = [sum(file.stat().st_size for file in Path(one, "predictions").iterdir()) for one in (in_order, shuffled)]
    rows.append({"what": "bytes of predictions/", "sorted": sizes[0], "shuffled": sizes[1], "unit": "bytes"})
    return rows


def timed(connection: duckdb.DuckDBPyConnection, sql: str, patient: str) -> float:
    begun = time.monotonic()
    connection.execute(sql, [patient]).fetchall()
    return time.monotonic() - begun


_REPORT = """
import re, sys
from malaria_ray import cli
if cli.main(["report", sys.argv[1]]):
    sys.exit(1)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def report(results: str) -> dict[str, float]:
    """Its peak is VmHWM of its own process, which begins at exec: getrusage would count what its parent held."""
    begun = time.monotonic()
    said = subprocess.run([sys.executable, "-c", _REPORT, results], check=True, capture_output=True, text=True)
    seconds = time.monotonic() - begun
    page = Path(results, "report", "index.html").stat().st_size
    return {"seconds": seconds, "peak_bytes": int(said.stdout.split()[-1]) * 1024, "page_bytes": page}


def markdown(said: dict) -> str:
    lines = [
        f"{said['rows']:,} predictions of {said['patients']:,} patients in parts of {PART_ROWS:,}; DuckDB "
        f"{duckdb.__version__}, medians of {N_ROUNDS} rounds.\n",
        *table(
            ("example query", "directory", "one file a table", "ratio"),
            [
                (row["query"], f"{row['ours_s']:.3f} s", f"{row['bare_s']:.3f} s", f"{row['ratio']:.2f}")
                for row in said["queries"]
            ],
        ),
        f"Opening the directory takes {said['queries'][0]['opening_s']:.3f} s.\n",
        *table(
            ("layout", "sorted", "shuffled", "ratio"),
            [
                (row["what"], amount(row["sorted"], row["unit"]), amount(row["shuffled"], row["unit"]),
                 f"{row['shuffled'] / row['sorted']:.2f}")
                for row in said["layout"]
            ],
        ),
        f"`report`: {said['report']['seconds']:.1f} s, {said['report']['peak_bytes'] / 1e6:,.0f} MB at its peak, a "
        f"page of {said['report']['page_bytes'] / 1e6:.1f} MB. All of this took {said['total_s']:.0f} s.",
    ]  # fmt: skip
    return "\n".join(lines)


def amount(value: float, unit: str) -> str:
    return f"{value * 1e3:.1f} ms" if unit == "s" else f"{value / 1e6:.1f} MB"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return [*("| " + " | ".join(line) + " |" for line in lines), ""]


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
