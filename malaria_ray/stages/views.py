"""The tables of results directories as DuckDB views: what 'query' and 'report' ask, and what catalog.sql creates.

    runs           one row per results directory: its place among those given, model, threshold, source
    predictions, quarantine, listing, splits, history, metrics, curves, patients, review, differences
                   the tables of schema.py, with the directory's name in a last column `results`
    cells          predictions with the split that the model knows each image by, whether it knows the patient, whether
                   an earlier image is the same cell (cells/copies.py), the threshold and the outcome

A view exists where every directory has its table. Files are named one by one and not by a pattern, so that no file
that happens to lie there is counted, and no directory name is taken for a pattern.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from malaria_ray.cells.copies import COPY_OF
from malaria_ray.errors import ConfigError, DirectoryError
from malaria_ray.runtime import outputs, storage
from malaria_ray.schema import (
    CURVES,
    DIFFERENCES,
    HISTORY,
    LISTING,
    METRICS,
    PATIENTS,
    PREDICTIONS,
    QUARANTINE,
    REVIEW,
    SCHEMA_VERSION,
    SPLITS,
    Table,
)

_AGAINST = "evaluate --against OTHER_RESULTS"
_PLACES: dict[str, tuple[Table, str, str]] = {
    "predictions": (PREDICTIONS, "predictions", "screen"),
    "quarantine": (QUARANTINE, "quarantine", "screen"),
    "listing": (LISTING, "listing.parquet", "screen"),
    "splits": (SPLITS, "model/splits.parquet", "screen"),
    "history": (HISTORY, "model/history.parquet", "screen"),
    "metrics": (METRICS, "metrics", "evaluate"),
    "curves": (CURVES, "curves", "evaluate"),
    "patients": (PATIENTS, "patients", "evaluate"),
    "review": (REVIEW, "review", "evaluate"),
    "differences": (DIFFERENCES, "differences", _AGAINST),
}
"""View: its table, the file or folder of parts in a results directory, the command that writes it."""
_ENDS_WITH = {"evaluate": "metrics", _AGAINST: "differences"}
"""Command: the folder where it says that it has finished."""

_CELLS = """\
CREATE OR REPLACE VIEW cells AS
SELECT
    predictions.* EXCLUDE (results),
    coalesce(by_content.split, by_name.split, 'unseen') AS split,
    known.patient_id IS NOT NULL AS knows_patient,
    runs.threshold,
    CASE
        WHEN predictions.label IS NULL THEN NULL
        WHEN predictions.label = 1 THEN if(predictions.predicted_label = 1, 'true positive', 'false negative')
        ELSE if(predictions.predicted_label = 1, 'false positive', 'true negative')
    END AS outcome,
    predictions.content_digest IS NOT NULL AND row_number() OVER (
        PARTITION BY predictions.results, coalesce(by_content.split, by_name.split), {copy_of}
        ORDER BY predictions.image_id
    ) > 1 AS is_copy,
    results
FROM predictions
JOIN runs USING (results)
LEFT JOIN (
    SELECT results, content_digest, arg_min(split, list_position(['train', 'val', 'test'], split)) AS split
    FROM splits WHERE content_digest IS NOT NULL GROUP BY results, content_digest
) AS by_content ON by_content.results = predictions.results AND by_content.content_digest = predictions.content_digest
LEFT JOIN splits AS by_name
    ON by_name.results = predictions.results AND by_name.image_id = predictions.image_id
    AND by_name.content_digest IS NULL
LEFT JOIN (SELECT DISTINCT results, patient_id FROM splits WHERE split IN ('train', 'val')) AS known
    ON known.results = predictions.results AND known.patient_id = predictions.patient_id;
""".format(copy_of=", ".join(f"predictions.{name}" for name in COPY_OF))
"""An image is known by its content, under any name: a folder and a zip of the same files are the same images. Bytes
that stand in several splits count as the one that the model saw most of: none that it was trained or tuned on is held
out. Splits of an older version have no digests: they know images by name.
"""


@dataclass(frozen=True, kw_only=True)
class Results:
    """One finished results directory. `name` is what the column `results` says."""

    name: str
    path: UPath
    success: dict[str, Any]
    run: dict[str, Any]

    def files(self, view: str) -> list[UPath]:
        """The Parquet files of a table that the command wrote, not what else lies there; none where it has not finished
        or one of them is missing.
        """
        _, place, command = _PLACES[view]
        if not self.has_finished(command):
            return []
        ending = self.path / _ENDS_WITH[command] / outputs.SUCCESS if command in _ENDS_WITH else None
        written = storage.read_json(ending) if ending else self.success
        files = [self.path / name for name in sorted(written["files"]) if name.split("/")[0] == place or name == place]
        if place.endswith(".parquet"):
            return files if all(file.exists() for file in files) else []
        present = {file.name for file in storage.parts(self.path / place)}
        return files if all(file.name in present for file in files) else []

    def has_finished(self, command: str) -> bool:
        return command not in _ENDS_WITH or (self.path / _ENDS_WITH[command] / outputs.SUCCESS).exists()


def open_results(urls: Sequence[str]) -> list[Results]:
    """The results directories at local paths or URLs, named by their last part, or by the whole URL where two would
    have one name. Raises: `NotCompleteError`, `DirectoryError`, `ConfigError`.
    """
    paths = [storage.locate(url) for url in urls]
    if len({str(path) for path in paths}) < len(paths):
        raise ConfigError(f"{', '.join(urls)}: one directory is given twice; give each once")
    return [
        Results(
            name=name,
            path=path,
            success=outputs.check_complete(path, "screen"),
            run=outputs.read_config(path, "screen"),
        )
        for name, path in zip(storage.short_names(paths), paths, strict=True)
    ]


def connect(results: Sequence[Results]) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB with the views over the given directories; other protocols are read through fsspec.

    Raises: `DirectoryError` where a table was written by a newer version.
    """
    connection = duckdb.connect(config={"autoinstall_known_extensions": False})
    for one in results:
        if not storage.is_local(one.path) and not connection.filesystem_is_registered(_protocol(one.path)):
            connection.register_filesystem(one.path.fs)
    connection.execute(_create_views(results, lambda file: storage.as_url(file)))
    return connection


@contextmanager
def reading(results: Sequence[Results]) -> Iterator[duckdb.DuckDBPyConnection]:
    """`connect` for the length of a block, behind which what was read may be told.

    Raises: as `connect`; `DirectoryError` or `NotCompleteError` where one of them was made anew or opened again
    meanwhile.
    """

    def check() -> None:
        for one in results:
            outputs.check_same(one.path, "screen", one.success)

    with connect(results) as connection:
        try:
            yield connection
        except Exception:
            check()  # files that went away say less
            raise
    check()


def catalog(results: Results) -> str:
    """SQL that creates the views, with paths relative to the directory: `duckdb -init catalog.sql` run in it."""
    prefix = results.path.path.rstrip("/") + "/"
    return (
        f"-- Tables of the results {_comment(results.name)} as views, written by 'malaria-ray report'.\n"
        "-- In this directory:  duckdb -init catalog.sql\n"
        "-- 'malaria-ray schema' says what each column means; 'malaria-ray query --examples' lists questions.\n\n"
        + _create_views([results], lambda file: file.path.removeprefix(prefix))
    )


def check_cells(results: Sequence[Results]) -> None:
    """Raises: `DirectoryError` where a table is missing that the view `cells` is made of."""
    absent = absent_views(results)
    if (line := absent.get("splits") or absent.get("predictions")) is not None:
        raise DirectoryError(line)


def known_patients_line(connection: duckdb.DuckDBPyConnection, results: Results) -> str | None:
    """How many cells count as held out though the run was trained or tuned on other cells of their patients; None where
    none does.
    """
    found = connection.execute(
        "SELECT count(*) FILTER (knows_patient), count(*) FROM cells "
        "WHERE results = $1 AND split NOT IN ('train', 'val')",
        [results.name],
    )
    ((n_known, n_cells),) = found.fetchall()
    return known_patients_said(results, n_known, f"{n_cells:,} held-out cells") if n_known else None


def known_patients_said(results: Results, n_known: int, of_cells: str) -> str:
    """The sentence for `n_known` of some cells."""
    split_by = storage.read_json(results.path / "model" / "config.json")["config"].get("split_by")
    why = ", as the run was split by image" if split_by == "image" else ""
    return (
        f"{n_known:,} of {of_cells} are of patients that the run was trained or tuned on{why}: their figures are "
        "better than a new patient's would be."
    )


def copies_line(connection: duckdb.DuckDBPyConnection, results: Results) -> str | None:
    """How many predictions are of copies, which metrics and patients count once; None where there are none."""
    found = connection.execute(
        "SELECT count(*) FILTER (is_copy), count(*) FROM cells WHERE results = $1",
        [results.name],
    )
    ((n_copies, n_cells),) = found.fetchall()
    if not n_copies:
        return None
    return (
        f"{n_copies:,} of {n_cells:,} cells are copies of others, byte for byte, of the same patient and split: "
        "metrics and patients count each once."
    )


def absent_views(results: Sequence[Results]) -> dict[str, str]:
    """Each view that cannot be had, and the line that says what to do."""
    absent = {}
    for view, (_, _, command) in _PLACES.items():
        if lacking := [one for one in results if not one.files(view)]:
            path = lacking[0].path
            if command == "screen":
                absent[view] = f"the table {view} is missing in {path}; 'malaria-ray verify' says what else is"
            elif lacking[0].has_finished(command):
                absent[view] = f"there is no table {view} in {path}: the 'malaria-ray {command}' that ran wrote none"
            else:
                absent[view] = f"there is no table {view} in {path}; run 'malaria-ray {command}' on it"
    return absent


def _create_views(results: Sequence[Results], name_of: Any) -> str:
    absent = absent_views(results)
    statements = [_runs(results)]
    for view in _PLACES:
        if view not in absent:
            of_each = (_select(one, view, name_of) for one in results)
            statements.append(f"CREATE OR REPLACE VIEW {view} AS\n" + "\nUNION ALL BY NAME\n".join(of_each) + ";\n")
        else:
            statements.append(f"-- There is no table {view} here.\n")
    if not {"predictions", "splits"} & absent.keys():
        statements.append(_CELLS)
    return "\n".join(statements)


def _runs(results: Sequence[Results]) -> str:
    rows = [
        (
            number,
            one.name,
            one.success["run_id"],
            one.success["model"],
            one.success["threshold"],
            one.run["identity"]["engine"],
            one.run["identity"]["split"],
            one.run["config"]["source"],
            one.success["finished_at"],
        )
        for number, one in enumerate(results, start=1)
    ]
    values = ",\n    ".join("(" + ", ".join(_literal(value) for value in row) + ")" for row in rows)
    return (
        f"CREATE OR REPLACE VIEW runs AS\nSELECT * FROM (VALUES\n    {values}\n"
        ") AS runs(number, results, run_id, model, threshold, engine, screened_split, source, finished_at);\n"
    )


def _select(results: Results, view: str, name_of: Any) -> str:
    """One directory's part of a view: the columns of the schema, null where an older version did not write one."""
    files, table = results.files(view), _PLACES[view][0]
    found = _schema(files[0]).names
    columns = [
        f'"{column.name}"' if column.name in found else f'NULL::{_SQL_TYPES[str(column.type)]} AS "{column.name}"'
        for column in table.columns
    ]
    listed = ", ".join(_literal(_not_a_pattern(name_of(file))) for file in files)
    return f"SELECT {', '.join(columns)}, {_literal(results.name)} AS results\nFROM read_parquet([{listed}])"


_SQL_TYPES = {
    "string": "VARCHAR",
    "int8": "TINYINT",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "float": "FLOAT",
    "double": "DOUBLE",
    "bool": "BOOLEAN",
    "list<element: string>": "VARCHAR[]",
    "list<item: string>": "VARCHAR[]",
}


def _schema(file: UPath) -> pa.Schema:
    """Raises: `DirectoryError` where the file cannot be read or was written by a newer version."""
    try:
        with file.open("rb") as opened:
            schema = pq.read_schema(opened)
    except (pa.ArrowInvalid, OSError) as error:
        said = " ".join(str(error).split())
        raise DirectoryError(
            f"{file} cannot be read ({said}); 'malaria-ray verify' says what else was changed"
        ) from error
    version = int((schema.metadata or {}).get(b"malaria_ray.schema_version", 0))
    if version > SCHEMA_VERSION:
        raise DirectoryError(
            f"{file} has schema version {version}, this malaria_ray reads up to {SCHEMA_VERSION}; update malaria_ray"
        )
    return schema


def _protocol(path: UPath) -> str:
    protocol = path.fs.protocol
    return protocol if isinstance(protocol, str) else str(protocol[0])


def _literal(value: Any) -> str:
    if isinstance(value, (int, float)):
        return repr(value) if isinstance(value, int) else f"{value!r}::DOUBLE"
    return "'" + str(value).replace("'", "''") + "'"


def _not_a_pattern(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _comment(text: str) -> str:
    return " ".join(text.split())


def table_views() -> tuple[str, ...]:
    return tuple(_PLACES)


def table_of(view: str) -> Table:
    return _PLACES[view][0]


def view_names() -> tuple[str, ...]:
    return ("runs", *_PLACES, "cells")
