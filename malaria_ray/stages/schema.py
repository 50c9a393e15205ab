"""schema: prints the data dictionary."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table as RichTable
from tyro.conf import Positional

from malaria_ray.errors import ConfigError
from malaria_ray.runtime.terminal import console
from malaria_ray.schema import REASON_MEANING, SCHEMA_VERSION, TABLES, VIEWS


@dataclass(frozen=True, kw_only=True)
class Config:
    """Prints every table's and view's columns, types, units and meaning, and the quarantine reasons."""

    table: Positional[str | None] = None
    """One table or view; all of them by default."""

    def __post_init__(self) -> None:
        if self.table is not None and self.table not in TABLES | VIEWS:
            raise ConfigError(f"{self.table!r} is no table; allowed are {', '.join(TABLES | VIEWS)}")


def run(config: Config) -> None:
    out = console()
    known = TABLES | VIEWS
    for table in [known[config.table]] if config.table else known.values():
        shown = RichTable(
            "column", "type", "unit", "meaning", title=f"{table.name}: {table.meaning}", title_justify="left"
        )
        for column in table.columns:
            shown.add_row(column.name, str(column.type), column.unit or "", column.meaning)
        out.print(shown)
    if config.table in (None, "quarantine"):
        reasons = RichTable("reason", "meaning", title="quarantine reasons", title_justify="left")
        for reason, meaning in REASON_MEANING.items():
            reasons.add_row(reason.value, meaning)
        out.print(reasons)
    out.print(f"schema version {SCHEMA_VERSION}")
