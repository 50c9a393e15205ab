"""report: a results directory becomes report/index.html, one file to read in a browser, catalog.sql for DuckDB,
and croissant.json, its data dictionary.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import duckdb
from tyro.conf import Positional

from malaria_ray.errors import ConfigError, DirectoryError
from malaria_ray.runtime import outputs, storage
from malaria_ray.runtime.provenance import code_digest
from malaria_ray.runtime.terminal import console, printable
from malaria_ray.schema import REASON_MEANING, RESEARCH_ONLY, Label
from malaria_ray.stages import figures
from malaria_ray.stages.croissant import croissant
from malaria_ray.stages.galleries import find_galleries, find_review_galleries, heats, pictures
from malaria_ray.stages.pages import render, templates_digest
from malaria_ray.stages.views import (
    Results,
    absent_views,
    catalog,
    copies_line,
    known_patients_line,
    open_results,
    reading,
)

log = logging.getLogger("malaria_ray")

_MAX_THUMBNAILS = 100
_MAX_PATIENTS = 20_000  # rows of the patient table: about 1.5 MB
_MAX_QUARANTINED = 200


@dataclass(frozen=True, kw_only=True)
class Config:
    """Writes report/index.html, catalog.sql and croissant.json into a results directory."""

    results: Positional[str]
    """Directory made by 'malaria-ray screen', best after 'malaria-ray evaluate'."""
    thumbnails: int = 24
    """Cells that each gallery shows at most."""
    grad_cam: bool = True
    """Where the model looked beside each cell, for which the run must lie where it did when it screened."""
    overwrite: bool = False
    """Write the report anew where it is there."""

    def __post_init__(self) -> None:
        if not 0 <= self.thumbnails <= _MAX_THUMBNAILS:
            raise ConfigError(f"--thumbnails {self.thumbnails}: allowed are 0 to {_MAX_THUMBNAILS}")


@outputs.one_writer()
def run(config: Config) -> None:
    """Writes the report; does nothing where it was made from the same tables by the same code."""
    (results,) = open_results([config.results])
    folder = results.path / "report"
    marker = folder / outputs.SUCCESS
    identity = _identity(results, config)
    targets = {
        "report/index.html": folder / "index.html",
        "catalog.sql": results.path / "catalog.sql",
        "croissant.json": results.path / "croissant.json",
    }
    is_there = marker.exists() and all(target.exists() for target in targets.values())
    if is_there and not config.overwrite and storage.read_json(marker)["identity"] == identity:
        log.info("%s has its report; nothing to do (--overwrite writes it anew)", results.path)
    else:
        outputs.hold_finished(results.path, "screen", results.success)
        storage.remove(marker)
        pages = {
            "report/index.html": _page(results, config),
            "catalog.sql": catalog(results),
            "croissant.json": json.dumps(croissant(results), indent=2, ensure_ascii=False) + "\n",
        }
        outputs.check_held(results.path)
        for name, target in targets.items():
            storage.write_bytes(target, pages[name].encode())
        files = {name: storage.record_of(target) for name, target in targets.items()}
        storage.write_json(marker, {"identity": identity, "files": files})
    n_bytes = storage.read_json(marker)["files"]["report/index.html"]["bytes"]
    out = console()
    out.print(f"{targets['report/index.html']}  open it in a browser ({n_bytes / 1e6:.1f} MB)", soft_wrap=True)
    where = "that directory" if storage.is_local(results.path) else "a copy of that directory"
    out.print(f"{targets['catalog.sql']}  duckdb -init catalog.sql, in {where}", soft_wrap=True)
    out.print(RESEARCH_ONLY)


def _identity(results: Results, config: Config) -> dict[str, Any]:
    """What decides the report: the tables, the page's own files, the code."""
    evaluated = results.path / "metrics" / outputs.SUCCESS
    compared = results.path / "differences" / outputs.SUCCESS
    return {
        "screened": {name: record["sha256"] for name, record in results.success["files"].items()},
        "evaluated": storage.read_json(evaluated)["identity"] if evaluated.exists() else None,
        "compared": storage.read_json(compared)["files"] if compared.exists() else None,
        "thumbnails": config.thumbnails,
        "grad_cam": config.grad_cam,
        "templates": templates_digest(),
        "code_digest": code_digest(),
    }


def _page(results: Results, config: Config) -> str:
    """The whole page. Raises: `DirectoryError` where a table that screening writes is missing."""
    absent = absent_views([results])
    for line in (line for line in absent.values() if "is missing" in line):
        raise DirectoryError(line)
    with reading([results]) as connection:
        trained = storage.read_json(results.path / "model" / "SUCCESS.json")
        split = _shown_split(connection, "label IS NOT NULL")
        galleries = find_galleries(connection, split=split, n_each=config.thumbnails)
        if "review" not in absent:
            galleries += find_review_galleries(connection, n_each=config.thumbnails)
        images, without_image = pictures(connection, galleries, image_size=trained["image_size"])
        heat, without_heat = heats(results.path, images) if config.grad_cam else ({}, None)
        if without_heat:
            log.warning("no Grad-CAM in the report: %s", without_heat)
        return render(
            "report.html",
            name=results.name,
            success=results.success,
            run=results.run,
            training=storage.read_json(results.path / "model" / "config.json"),
            trained=trained,
            reasons={reason.value: meaning for reason, meaning in REASON_MEANING.items()},
            is_evaluated="metrics" not in absent,
            split=split,
            notices=[
                line for line in (known_patients_line(connection, results), copies_line(connection, results)) if line
            ],
            data=_data(connection),
            metrics=_metrics(connection) if "metrics" not in absent else {},
            confusion=_confusion(connection, split),
            figures=figures.of_cells(connection, split=split, threshold=results.success["threshold"]),
            learning=figures.of_training(connection, best_epoch=int(trained["best"]["epoch"])),
            patients=_patients(connection) if "patients" not in absent else None,
            patients_figure=figures.of_patients(connection, split=_shown_split(connection, "patient_id IS NOT NULL"))
            if "patients" not in absent
            else None,
            galleries=galleries,
            images=images,
            without_image=without_image,
            heat=heat,
            without_heat=without_heat,
            quarantine=_quarantine(connection),
        )


def _rows(connection: duckdb.DuckDBPyConnection, sql: str, **given: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = connection.sql(sql, params=given).to_arrow_table().to_pylist()
    return rows


def _shown_split(connection: duckdb.DuckDBPyConnection, condition: str) -> str | None:
    """The split to judge the model by, of the cells that meet an SQL condition: of test and unseen the one with both
    classes, then the one with more labelled cells; without these val, then train; None without any.
    """
    found = connection.execute(
        f"SELECT split FROM cells WHERE {condition} GROUP BY split ORDER BY split IN ('test', 'unseen') DESC, "
        "split = 'val' DESC, count(DISTINCT label) DESC, count(label) DESC, count(*) DESC, split LIMIT 1"
    ).fetchone()
    return found[0] if found else None


def _data(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Counts of files and cells; sizes in pixels."""
    (whole,) = _rows(
        connection,
        """
        SELECT count(*) AS n, count(DISTINCT patient_id) AS n_patients,
               count(*) - count(patient_id) AS n_without_patient, count(*) - count(label) AS n_unlabelled,
               min(width) AS width_min, median(width) AS width_median, max(width) AS width_max,
               min(height) AS height_min, median(height) AS height_median, max(height) AS height_max,
               count(content_digest) - count(DISTINCT content_digest) AS n_duplicates
        FROM predictions
        """,
    )
    by_split = _rows(
        connection,
        """
        SELECT split, count(*) AS n, count(*) FILTER (label = 0) AS n_uninfected,
               count(*) FILTER (label = 1) AS n_parasitized, count(*) FILTER (label IS NULL) AS n_unlabelled,
               count(DISTINCT patient_id) AS n_patients, sum(predicted_label)::BIGINT AS n_called
        FROM cells GROUP BY split ORDER BY list_position(['train', 'val', 'test', 'unseen'], split)
        """,
    )
    return {**whole, "by_split": by_split}


def _metrics(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """By level: the splits with their n, and of each metric its value and interval by split."""
    rows = _rows(connection, "SELECT split, level, metric, value, ci_low, ci_high, n FROM metrics")
    tables: dict[str, Any] = {}
    for level in ("cell", "patient"):
        of_level = [row for row in rows if row["level"] == level and not row["metric"].startswith("n_")]
        splits: dict[str, int] = {}
        for row in of_level:  # rates of one class are of fewer patients
            splits[row["split"]] = max(row["n"], splits.get(row["split"], 0))
        values: dict[str, dict[str, Any]] = {}
        for row in of_level:
            values.setdefault(row["metric"], {})[row["split"]] = row
        ordered = [str(split) for split in ("train", "val", "test", "unseen") if split in splits]
        tables[level] = {"splits": {split: splits[split] for split in ordered}, "values": values}
    return tables


def _confusion(connection: duckdb.DuckDBPyConnection, split: str | None) -> dict[str, int]:
    rows = _rows(
        connection,
        "SELECT outcome, count(*) AS n FROM cells WHERE split = $split AND outcome IS NOT NULL AND NOT is_copy "
        "GROUP BY outcome",
        split=split,
    )
    return {row["outcome"].replace(" ", "_"): row["n"] for row in rows}


def _patients(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Rows of the patient table: id, label, cells, called parasitized, fraction, ends of its interval, split, and the
    call where any patient has one.
    """
    ((n_rows, n_patients, n_calls, call_threshold),) = connection.execute(
        "SELECT count(*), count(DISTINCT patient_id), count(call), any_value(call_threshold) FROM patients"
    ).fetchall()
    rows = connection.execute(
        "SELECT patient_id, label, n_cells, n_parasitized, round(parasitized_fraction, 4), round(ci_low, 4), "
        f"round(ci_high, 4), split{', call' if n_calls else ''} FROM patients "
        f"ORDER BY parasitized_fraction DESC, patient_id, split LIMIT {_MAX_PATIENTS}"
    ).fetchall()
    names = {None: "no label"} | {label.value: label.name for label in Label}
    return {
        "n": n_rows,
        "n_patients": n_patients,
        "has_calls": bool(n_calls),
        "call_threshold": call_threshold,
        "rows": [[printable(patient), names[label], *others] for patient, label, *others in rows],
    }


def _quarantine(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    return {
        "reasons": _rows(
            connection, "SELECT reason, count(*) AS n FROM quarantine GROUP BY reason ORDER BY n DESC, reason"
        ),
        "rows": _rows(
            connection,
            "SELECT image_id, reason, detail, n_bytes FROM quarantine ORDER BY reason, image_id "
            f"LIMIT {_MAX_QUARANTINED}",
        ),
    }
