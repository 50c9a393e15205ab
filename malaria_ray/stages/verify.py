"""verify: proves from the files alone that a finished directory is what its stage left there, each image exactly
once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from tyro.conf import Positional
from upath import UPath

from malaria_ray.errors import DirectoryError, InvariantError
from malaria_ray.runtime import outputs, storage
from malaria_ray.runtime.terminal import console
from malaria_ray.schema import AUDIT_METRICS, LABEL_AUDIT, OK, PREDICTIONS, QUARANTINE, SCHEMA_VERSION, SPLITS, Table

_N_NAMED = 10

_TABLE_OF_COUNT = {"scored": "predictions", "quarantined": "quarantine"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Checks a dataset, run, results or audit directory; fails with the offending image ids where a row is missing,
    doubled or changed.
    """

    directory: Positional[str]
    """Directory made by 'malaria-ray ingest', 'pack', 'train', 'screen' or 'audit'."""


def run(config: Config) -> None:
    """Prints what was proved. Raises: `InvariantError` with every fault that was found."""
    path = storage.locate(config.directory)
    stage = outputs.stage_of(path)
    if stage is None:
        raise DirectoryError(f"{path} is no dataset, run or results directory of malaria-ray")
    success = outputs.check_complete(path, stage)
    written = {**success["files"], **success.get("config", {})}
    faults = [*_file_faults(path, written), *_extra_files(path, success["files"])]
    checks = {"ingest": _dataset_faults, "pack": _packed_faults, "train": _run_faults, "screen": _results_faults}
    checks["audit"] = _audit_faults
    faults += checks[stage](path)
    if stage == "screen":
        faults += _count_faults(path, success["counts"])
        faults += _evaluated_faults(path, success)
    added = outputs.files_added(path)
    faults += [*_file_faults(path, added), *_extra_files(path, added)]
    if faults:
        raise InvariantError(f"{path} does not hold: " + "; ".join(faults))
    counted = {name.removeprefix("n_"): n for name, n in success["counts"].items() if isinstance(n, int)}
    told = ", ".join(f"{name} {n:,}" for name, n in counted.items())
    console().print(f"{path} holds: {len(success['files'] | added)} files as written; {told}", soft_wrap=True)


def _file_faults(path: UPath, files: dict[str, Any]) -> Iterator[str]:
    """Files that are gone or are not the bytes that were written."""
    for name, record in files.items():
        file = path / name
        if not file.exists():
            yield f"{name} is missing"
            continue
        try:
            found = storage.record_of(file)
        except (pa.ArrowException, OSError) as error:
            yield f"{name} cannot be read ({' '.join(str(error).split())[:80]})"
            continue
        if found != record:
            yield f"{name} was changed ({found['bytes']:,} bytes, {record['bytes']:,} written)"


def _extra_files(path: UPath, files: dict[str, Any]) -> Iterator[str]:
    """Parquet files in the tables' folders that the stage did not write: every reader of the folder would count
    them.
    """
    for folder in sorted({name.rpartition("/")[0] for name in files if "/" in name}):
        for file in storage.children(path / folder):
            is_known = f"{folder}/{file.name}" in files or file.name == outputs.SUCCESS
            if not is_known and not storage.is_draft(file.name):
                yield f"{folder}/{file.name} was not written by the stage"


def _evaluated_faults(path: UPath, success: dict[str, Any]) -> Iterator[str]:
    """Metrics that were computed from other predictions than those that are there."""
    marker = path / "metrics" / outputs.SUCCESS
    if not marker.exists():
        return
    if storage.read_json(marker)["identity"]["predictions"] != outputs.digests_in(success, "predictions"):
        yield "metrics/ and patients/ are of other predictions: run 'malaria-ray evaluate' again"


def _dataset_faults(path: UPath) -> Iterator[str]:
    """Invariant 1: rows(manifest) = rows(crops) + rows(quarantine), every image once."""
    manifest = _ids(path / "manifest.parquet", status=True)
    if manifest is None:
        return
    is_ok = pc.equal(manifest["status"], OK)
    for folder, wanted in (
        ("crops", manifest.filter(is_ok)),
        ("quarantine", manifest.filter(pc.invert(is_ok))),
    ):
        yield from _difference(f"{folder}/", wanted["image_id"], _ids_of_parts(path / folder))
    yield from _doubled("manifest.parquet", manifest["image_id"])


def _results_faults(path: UPath) -> Iterator[str]:
    """Invariant 1: rows found in the archive = rows(predictions) + rows(quarantine), every image once."""
    listing = _ids(path / "listing.parquet")
    if listing is None:
        return
    found = pa.chunked_array(
        [*_ids_of_parts(path / "predictions").chunks, *_ids_of_parts(path / "quarantine").chunks], pa.string()
    )
    yield from _difference("predictions/ and quarantine/", listing["image_id"], found)
    for folder, table in (("predictions", PREDICTIONS), ("quarantine", QUARANTINE)):
        yield from _schema_faults(path / folder, table)


def _count_faults(path: UPath, counts: dict[str, Any]) -> Iterator[str]:
    """What `_SUCCESS.json` says was counted, against the rows."""
    parts = {"n_files": [path / "listing.parquet"]}
    parts |= {f"n_{name}": storage.parts(path / table) for name, table in _TABLE_OF_COUNT.items()}
    for name, files in parts.items():
        try:
            n = sum(storage.n_rows(file) for file in files)
        except (pa.ArrowException, OSError):
            continue  # told by its record already
        if n != (told := counts.get(name)):
            yield f"{outputs.SUCCESS} says {name} {told}, the tables have {n:,}"


def _packed_faults(path: UPath) -> Iterator[str]:
    """One row per file of the archive that was packed, each name once."""
    listing = _ids(path / "listing.parquet")
    if listing is not None:
        yield from _difference("images/", listing["image_id"], _ids_of_parts(path / "images"))


def _audit_faults(path: UPath) -> Iterator[str]:
    """Every image at most once."""
    yield from _doubled(f"{LABEL_AUDIT.name}/", _ids_of_parts(path / LABEL_AUDIT.name))
    for table in (LABEL_AUDIT, AUDIT_METRICS):
        yield from _schema_faults(path / table.name, table)


def _run_faults(path: UPath) -> Iterator[str]:
    """Invariant 2: no patient is in two splits of a run by patient; every image is in one split."""
    splits = _ids(path / "splits.parquet", patient_id=True, split=True)
    if splits is None:
        return
    yield from _doubled(f"{SPLITS.name}.parquet", splits["image_id"])
    if outputs.read_config(path, "train")["config"]["split_by"] == "patient":
        per_patient = splits.to_pandas().groupby("patient_id")["split"].nunique()
        if len(several := sorted(per_patient[per_patient > 1].index)):
            yield f"{len(several)} patients are in several splits: {_some(several)}"


def _schema_faults(folder: UPath, table: Table) -> Iterator[str]:
    for part in storage.parts(folder):
        try:
            schema = storage.read_table(part).schema
        except (pa.ArrowException, OSError):
            continue  # told by its record already
        # An older version wrote fewer columns: they are added at the end alone.
        if schema.names != table.names[: max(1, len(schema.names))]:
            yield (
                f"{folder.name}/{part.name} has the columns {schema.names}, not those of schema version "
                f"{SCHEMA_VERSION}"
            )


def _ids(file: UPath, **more: bool) -> pa.Table | None:
    """The image ids of a table, with more columns; None where it cannot be read, which its record has told already."""
    try:
        return storage.read_table(file, columns=["image_id", *more])
    except (pa.ArrowException, OSError):
        return None


def _ids_of_parts(folder: UPath) -> pa.ChunkedArray:
    """The image ids of all parts that can be read, whether the stage wrote them or not."""
    tables = [table for part in storage.parts(folder) if (table := _ids(part)) is not None]
    return pa.chunked_array([chunk for table in tables for chunk in table["image_id"].chunks], pa.string())


def _difference(where: str, wanted: pa.ChunkedArray, found: pa.ChunkedArray) -> Iterator[str]:
    missing = wanted.filter(pc.invert(pc.is_in(wanted, value_set=found)))
    foreign = found.filter(pc.invert(pc.is_in(found, value_set=wanted)))
    if len(missing):
        yield f"{where} lacks {len(missing):,} images: {_some(missing.to_pylist())}"
    if len(foreign):
        yield f"{where} has {len(foreign):,} images that do not belong there: {_some(foreign.to_pylist())}"
    yield from _doubled(where, found)


def _doubled(where: str, ids: pa.ChunkedArray) -> Iterator[str]:
    counts = pc.value_counts(ids)
    doubled = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(doubled):
        yield f"{where} has {len(doubled):,} images more than once: {_some(doubled.to_pylist())}"


def _some(values: list[str]) -> str:
    named = ", ".join(repr(value) for value in sorted(values)[:_N_NAMED])
    return named + (f" and {len(values) - _N_NAMED:,} more" if len(values) > _N_NAMED else "")
