"""query: SQL over the tables of one or several results directories, answered by DuckDB."""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import duckdb
import tyro
from rich.table import Table as RichTable
from rich.text import Text
from tyro.conf import Positional

from malaria_ray.errors import ConfigError, QueryError
from malaria_ray.runtime import storage
from malaria_ray.runtime.terminal import console, folded, printable
from malaria_ray.stages.views import absent_views, open_results, reading, view_names

log = logging.getLogger("malaria_ray")

Format = Literal["table", "csv", "json", "parquet"]

_BORDER = 3  # letters of a table's border and margins for each column
_COPY_OPTIONS = {"csv": "FORMAT csv, HEADER", "json": "FORMAT json, ARRAY true", "parquet": "FORMAT parquet"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Answers SQL over the tables of results: runs, predictions, quarantine, listing, splits, history, metrics, curves,
    patients, review, differences, and cells (predictions with split, outcome, and whether the run knows the patient).
    """

    results_and_sql: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="RESULTS [RESULTS …] SQL")] = ()
    """Directories made by 'malaria-ray screen', then the SQL (with --example, the directories alone)."""
    example: str | None = None
    """Ask one of the examples instead of SQL."""
    examples: bool = False
    """List the examples and leave."""
    format: Format = "table"
    """table: for people, where it is too wide with a line for each value; csv, json (an array of objects), parquet: the
    whole answer for programs."""
    output: str | None = None
    """File or URL to write csv, json or parquet to; by default stdout."""
    max_rows: int = 100
    """Rows that a table shows at most."""

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ConfigError(f"--max-rows {self.max_rows}: must be at least 1")
        if self.output is not None and self.format == "table":
            raise ConfigError("--output needs --format csv, json or parquet")
        if self.example is not None and self.example not in (known := example_queries()):
            raise ConfigError(f"--example {self.example!r}: allowed are {', '.join(known)}")
        if self.examples:
            return
        if not self.directories:
            raise ConfigError(
                "give one or several results directories, then the SQL in quotes; or directories and --example NAME "
                "(--examples lists them)"
            )

    @property
    def directories(self) -> tuple[str, ...]:
        return self.results_and_sql if self.example else self.results_and_sql[:-1]

    @property
    def sql(self) -> str:
        return example_queries()[self.example] if self.example else self.results_and_sql[-1]


def example_queries() -> dict[str, str]:
    """The SQL of each example by name; its first line is a comment that says what it answers."""
    folder = resources.files("malaria_ray.stages") / "queries"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name)
    return {file.name.removesuffix(".sql"): file.read_text(encoding="utf-8") for file in files}


def run(config: Config) -> None:
    """Prints the answer, or writes it to --output."""
    if config.examples:
        _print_examples()
        return
    if config.example and "Needs several results" in config.sql and len(config.directories) < 2:
        raise ConfigError(f"--example {config.example} compares results; give two directories or more")
    if config.format == "parquet" and config.output is None and sys.stdout.isatty():
        raise ConfigError("--format parquet writes bytes, not text; give --output FILE, or send stdout to a file")
    results = open_results(config.directories)
    with tempfile.TemporaryDirectory(prefix="malaria-ray-") as folder:
        file = Path(folder) / "answer"
        try:
            with reading(results) as connection:
                _check_only_asks(connection, config.sql)
                answer = connection.sql(config.sql)
                if answer is None:
                    raise QueryError("the SQL holds no statement; give one in quotes, or --example NAME")
                if config.format == "table":
                    shown = _shown_of(connection.sql("FROM answer"), config.max_rows)  # names columns as COPY does
                else:  # a file, so that an answer of any size is shown whole or not at all
                    connection.execute(f"COPY (FROM answer) TO '{file}' ({_COPY_OPTIONS[config.format]})")
        except duckdb.Error as error:
            raise QueryError(_explained(error, absent_views(results))) from error
        if config.format == "table":
            _print_table(*shown)
        else:
            _put(file, config.output)


def _check_only_asks(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Raises: `QueryError` for what writes files: a slip of the pen must not cost results."""
    writing = {duckdb.StatementType.COPY, duckdb.StatementType.EXPORT}
    for statement in connection.extract_statements(sql):
        if statement.type in writing:
            what = statement.type.name
            raise QueryError(f"{what} writes files; give the SELECT alone, --output FILE writes its answer")


def _explained(error: duckdb.Error, absent: dict[str, str]) -> str:
    """What DuckDB says; for a table that is not there, what makes it."""
    said = str(error)
    if isinstance(error, duckdb.CatalogException) and "does not exist" in said:
        name = said.partition("with name ")[2].partition(" ")[0].lower()
        if name in absent or (name == "cells" and absent):
            return absent.get(name) or next(iter(absent.values()))
        return f"there is no table {name}; allowed are {', '.join(view_names())}"
    return said.partition("\n\nLINE")[0]


def _shown_of(answer: duckdb.DuckDBPyRelation, max_rows: int) -> tuple[list[str], list[list[Text]], int]:
    """Names of the columns, the first rows, and how many there are."""
    rows: list[list[Text]] = []
    n_rows = 0
    for batch in answer.to_arrow_reader(max(max_rows, 10_000)):
        shown = batch.slice(0, max(0, max_rows - n_rows))
        columns = (column.to_pylist() for column in shown.columns)
        rows += ([Text(_shown(value)) for value in row] for row in zip(*columns, strict=True))
        n_rows += batch.num_rows
    return [printable(name) for name in answer.columns], rows, n_rows


def _print_table(names: list[str], rows: list[list[Text]], n_rows: int) -> None:
    out = console()
    if rows and sum(len(name) + _BORDER for name in names) > out.width:  # as psql's \x auto
        for i, row in enumerate(rows, start=1):
            table = RichTable(show_header=False, title=f"row {i}", title_justify="left")
            for name, value in zip(names, row, strict=True):
                table.add_row(name, value)
            out.print(folded(table))
    else:
        table = RichTable(*names)
        for row in rows:
            table.add_row(*row)
        out.print(folded(table))  # an id that is cut cannot be searched for
    if n_rows > len(rows):
        out.print(f"{len(rows):,} of {n_rows:,} rows; --max-rows shows more, --format csv all")


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else printable(str(value))


def _put(file: Path, output: str | None) -> None:
    """The answer to where it is asked for, by default stdout."""
    with file.open("rb") as written:
        if output is None:
            shutil.copyfileobj(written, sys.stdout.buffer)
            sys.stdout.buffer.flush()
            return
        target = storage.locate(output)
        if storage.is_local(target):
            Path(target.path).parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as opened:
            shutil.copyfileobj(written, opened)
    log.info("%s: %s bytes", target, f"{file.stat().st_size:,}")


def _print_examples() -> None:
    table = RichTable("example", "what it answers")
    for name, sql in example_queries().items():
        lines = [line.removeprefix("-- ") for line in sql.splitlines() if line.startswith("-- ")]
        table.add_row(name, " ".join(lines))
    out = console()
    out.print(table)
    out.print("malaria-ray query RESULTS --example NAME asks one of them")
