"""Predictions in an Apache Iceberg table, written by Ray Data as an upsert on run_id and image_id.

The files of `predictions/` stay the truth; the table is for those who collect the results of many screenings in one.
A row that is there already is replaced, so that writing results twice, or again after a kill, changes no row.

    catalog    a name in pyiceberg's own configuration (~/.pyiceberg.yaml or PYICEBERG_CATALOG__NAME__URI and so on), or
               None: SQLite and files in RESULTS/iceberg/, which holds absolute paths and must stay where it is
    table      namespace.name, made if missing
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
from upath import UPath

from malaria_ray.errors import ConfigError
from malaria_ray.runtime import storage
from malaria_ray.runtime.session import ray_session
from malaria_ray.schema import PREDICTIONS, SCHEMA_VERSION

if TYPE_CHECKING:
    from pyiceberg.catalog import Catalog
    from pyiceberg.table import Table

log = logging.getLogger("malaria_ray")

DEFAULT_TABLE = "malaria_ray.predictions"
KEY = ("run_id", "image_id")
_DIGEST, _RUN_ID = "malaria_ray.digest", "malaria_ray.run_id"  # of what a snapshot added, in its summary


def check_iceberg(results: UPath, catalog: str | None, table: str) -> None:
    """What can be known before anything is scored. Raises: `ConfigError`."""
    if len([part for part in table.split(".") if part]) < 2:
        raise ConfigError(f"--iceberg-table {table!r}: give a namespace and a name, such as {DEFAULT_TABLE}")
    if catalog is None and not storage.is_local(results):
        raise ConfigError(
            f"{results} is no local directory, where the default Iceberg catalog could be; name one of pyiceberg's "
            "configuration by --iceberg-catalog NAME"
        )
    if catalog is None:
        _import()
    else:
        _load(results, catalog)


def open_iceberg(results: UPath, catalog: str | None = None, table: str = DEFAULT_TABLE) -> Table:
    """The table, to read. Raises: `ConfigError` where pyiceberg or the table is missing."""
    from pyiceberg.exceptions import NoSuchTableError

    opened = _load(results, catalog)[0]
    try:
        return opened.load_table(table)
    except NoSuchTableError as error:
        raise ConfigError(f"there is no Iceberg table {table} in the catalog of {results}") from error


def upsert_predictions(results: UPath, *, catalog: str | None = None, table: str = DEFAULT_TABLE) -> bool:
    """Writes predictions/ of one run into the table; False where it holds them already and nothing was written.

    One commit, seen whole or not at all. Raises: `ConfigError` where the catalog cannot be had.
    """
    parts = storage.parts(results / "predictions")
    digest = hashlib.sha256("".join(storage.record_of(part)["sha256"] for part in parts).encode()).hexdigest()[:32]
    run_ids = storage.read_table(results / "predictions", columns=["run_id"])["run_id"].unique().to_pylist()
    if not run_ids:
        log.info("no image was scored: nothing to write into the Iceberg table %s", table)
        return False
    (run_id,) = run_ids
    opened, options = _load(results, catalog)
    schema = _schema(storage.read_table(parts[0]).schema)
    opened.create_namespace_if_not_exists(tuple(table.split(".")[:-1]))
    target = opened.create_table_if_not_exists(
        table, schema=schema, properties={"malaria_ray.schema_version": str(SCHEMA_VERSION)}
    )
    if target.current_snapshot() is None:
        target.append(schema.empty_table())  # Ray 2.60 cannot upsert into a table without a snapshot: unknown ref=main
    elif _holds(target, run_id, digest):
        log.info("the Iceberg table %s holds these predictions; nothing to do", table)
        return False
    filesystem, _ = storage.arrow_filesystem(results)
    with ray_session():
        rows = ray.data.read_parquet(
            [part.path for part in parts], filesystem=filesystem, override_num_blocks=len(parts)
        ).map_batches(_cast, fn_kwargs={"schema": schema}, batch_format="pyarrow", batch_size=None)
        rows.write_iceberg(
            table,
            catalog_kwargs=options,
            mode=ray.data.SaveMode.UPSERT,
            upsert_kwargs={"join_cols": list(KEY)},
            snapshot_properties={_DIGEST: digest, _RUN_ID: run_id},
        )
    log.info("predictions of %s are in the Iceberg table %s", run_id, table)
    return True


def _import() -> None:
    try:
        importlib.import_module("pyiceberg.catalog")
        importlib.import_module("sqlalchemy")
    except ImportError as error:
        raise ConfigError(f"Iceberg tables need pyiceberg ({error}): pip install 'malaria-ray[iceberg]'") from error


def _load(results: UPath, catalog: str | None) -> tuple[Catalog, dict[str, Any]]:
    """The catalog, and what opens it again elsewhere."""
    _import()
    from pyiceberg.catalog import load_catalog
    from sqlalchemy import URL

    if catalog is None:
        folder = storage.locate(results / "iceberg")
        folder.mkdir(parents=True, exist_ok=True)
        database = URL.create("sqlite", database=f"{folder.path}/catalog.db").render_as_string()
        options = {"name": "local", "type": "sql", "uri": database, "warehouse": f"{folder.path}/warehouse"}
    else:
        options = {"name": catalog}
    try:
        return load_catalog(**options), options
    except Exception as error:  # each kind of catalog has its own
        raise ConfigError(
            f"the Iceberg catalog {options['name']} cannot be opened ({type(error).__name__}: {error}); describe it in "
            "~/.pyiceberg.yaml or by PYICEBERG_CATALOG__NAME__URI"
        ) from error


def _schema(written: pa.Schema) -> pa.Schema:
    """As Iceberg has it: no integers below 32 bits; the meaning of each column is its comment."""
    meaning = {column.name: column.meaning for column in PREDICTIONS.columns}
    return pa.schema(
        [
            pa.field(
                field.name,
                pa.int32() if pa.types.is_int8(field.type) else field.type,
                metadata={"doc": meaning.get(field.name, "")},
            )
            for field in written
        ]
    )


def _cast(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    return rows.cast(schema)


def _holds(table: Table, run_id: str, digest: str) -> bool:
    """Whether the last snapshot of this run wrote these rows, and none since was made by anybody else."""
    for snapshot in reversed(table.snapshots()):
        summary = snapshot.summary
        if summary is None or summary.get(_RUN_ID) is None:
            return False
        if summary[_RUN_ID] == run_id:
            return bool(summary.get(_DIGEST) == digest)
    return False
