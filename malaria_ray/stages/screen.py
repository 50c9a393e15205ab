"""screen: an archive or dataset, and a run, become results: one score per image, one row per file."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig
from rich.table import Table as RichTable
from tyro.conf import Positional
from upath import UPath

import malaria_ray
from malaria_ray.archives import open_archive
from malaria_ray.archives.datasets import DatasetArchive
from malaria_ray.archives.listing import check_same_listing, list_archive, listing_digest, shards
from malaria_ray.archives.patients import patient_rule
from malaria_ray.archives.reading import read_cells
from malaria_ray.cells.images import PREPROCESSING
from malaria_ray.errors import ConfigError, InvariantError, ModelError, TooManyBadImagesError
from malaria_ray.models.engines import MODEL_FILE, EngineName, open_engine
from malaria_ray.runtime import iceberg, outputs, storage
from malaria_ray.runtime.session import n_cpus, ray_session
from malaria_ray.runtime.storage import FileRecord
from malaria_ray.runtime.terminal import console, progress
from malaria_ray.schema import OK, PREDICTIONS, QUARANTINE, RESEARCH_ONLY, Label, Split

log = logging.getLogger("malaria_ray")

_BLOCK_ROWS = 512  # what one actor takes at a time, and at most loses when it is killed
_PART_ROWS = 1_000_000
_ACTOR_CPUS = 0.9  # leaves room on every node for the tasks that read the listing and write the rows
_TASK_CPUS = 0.05
_WATCH_EVERY_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """Scores every image of an archive or dataset with a run's model."""

    source: Positional[str]
    """Archive or dataset."""
    results: Positional[str]
    """Directory to write, made if missing."""
    model: str
    """Run made by 'malaria-ray train'."""
    split: Split | Literal["all"] = "all"
    """Only the images of this split of the run."""
    engine: EngineName = "onnx"
    """onnx: ONNX Runtime; keras: the same network by Keras."""
    patients: tuple[str, ...] = ()
    """Patient mapping files of an archive, as for 'ingest'."""
    patient_pattern: str | None = None
    """Rule for patients in the paths of an archive, as for 'ingest'."""
    batch_size: int = 64
    """Images that the model takes at a time."""
    num_actors: int | None = None
    """Scoring processes; by default one for each CPU of the cluster."""
    max_bad_fraction: float = 0.5
    """Fail when more than this share of the files ends in quarantine."""
    table_format: Literal["parquet", "iceberg"] = "parquet"
    """iceberg: the predictions also as rows of an Iceberg table, in place of those of the same run and image."""
    iceberg_catalog: str | None = None
    """Catalog of pyiceberg's configuration (~/.pyiceberg.yaml); by default one in RESULTS/iceberg."""
    iceberg_table: str = iceberg.DEFAULT_TABLE
    """Its namespace and name."""
    overwrite: bool = False
    """Delete the results first if they are there."""

    def __post_init__(self) -> None:
        for name, value in (("--batch-size", self.batch_size), ("--num-actors", self.num_actors)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}: must be at least 1")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"--max-bad-fraction {self.max_bad_fraction}: allowed are 0 to 1")


@dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """What every scoring actor needs to know."""

    model_file: str
    engine: EngineName
    image_size: int
    batch_size: int
    n_threads: int
    threshold: float
    model: str
    run_id: str


def run(config: Config) -> None:
    """Makes the results; does nothing where they are finished; goes on where an earlier run of the same config
    stopped.
    """
    begun = time.monotonic()
    results, run_path = storage.locate(config.results), storage.locate(config.model)
    if config.table_format == "iceberg":
        iceberg.check_iceberg(results, config.iceberg_catalog, config.iceberg_table)
    trained = outputs.check_complete(run_path, "train")
    archive = open_archive(config.source)
    if isinstance(archive, DatasetArchive) and archive.image_size != trained["image_size"]:
        raise ModelError(
            f"{config.source} holds crops of {archive.image_size} × {archive.image_size} pixels, the model of "
            f"{config.model} takes "
            f"{trained['image_size']} × {trained['image_size']}; screen the archive itself, or a dataset of that "
            f"--image-size"
        )
    rule = patient_rule(config.patients, config.patient_pattern)
    identity = {
        **archive.identity(),
        **rule.identity,
        "run_id": trained["run_id"],
        "model_digest": trained["files"][MODEL_FILE[config.engine]]["sha256"],
        "engine": config.engine,
        "split": str(config.split),
        "threshold": trained["threshold"],
        "preprocessing": PREPROCESSING,
        "malaria_ray": malaria_ray.__version__,
    }
    if not outputs.prepare(results, stage="screen", config=config, identity=identity, overwrite=config.overwrite):
        log.info("%s is finished; nothing to do (--overwrite scores anew)", results)
        _write_iceberg(config, results)
        _print_summary(storage.read_json(results / outputs.SUCCESS))
        return

    _check_model_file(run_path, MODEL_FILE[config.engine], identity["model_digest"])
    listing = list_archive(archive, patients=rule.of_file, pattern=rule.pattern)
    listing = _of_split(listing, run_path, config.split)
    check_same_listing(results / outputs.WORK, listing)
    files = {"listing.parquet": storage.write_table(results / "listing.parquet", listing)}
    log.info("%s: %s images to screen with %s", archive.url, f"{listing.num_rows:,}", trained["run_id"])
    listed = time.monotonic()
    with ray_session():
        connected = time.monotonic()
        plan = ScoringPlan(
            model_file=storage.as_url(run_path / MODEL_FILE[config.engine]),
            engine=config.engine,
            image_size=trained["image_size"],
            batch_size=config.batch_size,
            n_threads=1,
            threshold=trained["threshold"],
            model=trained["model"],
            run_id=trained["run_id"],
        )
        n_scored = _score_all(listing, results, plan, n_actors=config.num_actors or n_cpus())
    scored = time.monotonic()

    rows = _scored_rows(results, listing)
    files |= _publish(rows, results)
    files |= _copy_run(run_path, results)
    counts = _counts(rows)
    _check_bad_fraction(counts, results, config.max_bad_fraction)
    _write_iceberg(config, results)
    outputs.finish(
        results,
        counts=counts,
        files=files,
        run_id=trained["run_id"],
        model=trained["model"],
        threshold=trained["threshold"],
        listing_digest=listing_digest(listing),
        is_synthetic=any("SYNTHETIC" in image_id for image_id in listing["image_id"].slice(0, 1000).to_pylist()),
        timings={
            "listing_s": round(listed - begun, 2),
            "ray_start_s": round(connected - listed, 2),
            "scoring_s": round(scored - connected, 2),
            "total_s": round(time.monotonic() - begun, 2),
            "images_scored": n_scored,
            "images_per_second": round(n_scored / (scored - connected), 1),
        },
    )
    _print_summary(storage.read_json(results / outputs.SUCCESS))
    log.info("results: %s", results)


def _check_model_file(run_path: UPath, name: str, digest: str) -> None:
    """A run whose model file was exchanged must not give scores under the run's name."""
    if not (run_path / name).exists():
        raise ModelError(f"{run_path / name} is missing; train the run anew or restore the file")
    if storage.record_of(run_path / name)["sha256"] != digest:
        raise ModelError(
            f"{run_path / name} is not the file that training wrote (its SHA-256 differs); restore it or train anew"
        )


def _of_split(listing: pa.Table, run_path: UPath, split: Split | Literal["all"]) -> pa.Table:
    """The rows of one split of the run. Raises: `ConfigError` where none of the images is in it."""
    if split == "all":
        return listing
    splits = storage.read_table(run_path / "splits.parquet", columns=["image_id", "split"])
    chosen = splits.filter(pc.equal(splits["split"], str(split)))["image_id"]
    kept = listing.filter(pc.is_in(listing["image_id"], value_set=chosen.combine_chunks()))
    if not kept.num_rows:
        raise ConfigError(
            f"none of the {listing.num_rows:,} images is in the {split} split of {run_path}, whose names look like "
            f"{splits['image_id'][0].as_py()!r}; --split needs the dataset or archive that the run was trained from"
        )
    return kept.set_column(0, "key", pa.array(np.arange(kept.num_rows)))


class _Scorer:
    """One actor: reads, decodes and scores in the same process, so that pixels are never copied between processes."""

    def __init__(self, plan: ScoringPlan):
        self.plan = plan
        model = storage.locate(plan.model_file).read_bytes()
        self.engine = open_engine(plan.engine, model, n_threads=plan.n_threads, batch_size=plan.batch_size)

    def __call__(self, listing: pa.Table) -> pa.Table:
        plan = self.plan
        cells = read_cells(listing, image_size=plan.image_size)
        ok = pc.equal(cells.table["status"], OK).to_numpy()
        scores = np.zeros(len(ok), np.float32)
        scores[ok] = self.engine.score(cells.pixels)
        n = cells.table.num_rows
        return (
            cells.table.append_column("key", listing["key"])
            .append_column("score", pa.array(scores, mask=~ok))
            .append_column(
                "predicted_label", pa.array((scores >= np.float32(plan.threshold)).astype(np.int8), mask=~ok)
            )
            .append_column("model", pa.repeat(plan.model, n))
            .append_column("run_id", pa.repeat(plan.run_id, n))
        )


def _score_all(listing: pa.Table, results: UPath, plan: ScoringPlan, *, n_actors: int) -> int:
    """Scores what no earlier run finished, and leaves the rows in the work folder; returns how many were scored now."""
    work = results / outputs.WORK
    if not (work / "blocks.json").exists():
        # One small file a block: a kill costs an actor one block, and Ray reads each as it is (STACK.md, trap 7).
        n_blocks = 0
        for n_blocks, block in enumerate(shards(listing, _block_rows(listing.num_rows, n_actors)), start=1):
            storage.write_table(work / "listing" / storage.part_name(n_blocks - 1), block)
        storage.write_json(work / "blocks.json", {"n_blocks": n_blocks})
    n_before = _n_rows((work / "scored").glob("*.parquet")) if (work / "scored").exists() else 0
    todo: int = listing.num_rows - n_before
    if n_before:
        log.info("%s of %s images were scored before", f"{n_before:,}", f"{listing.num_rows:,}")
    if todo <= 0:
        return 0
    filesystem, root = storage.arrow_filesystem(work)
    context = DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="key",
        checkpoint_path=f"{root}/checkpoint",
        override_filesystem=filesystem,
        delete_checkpoint_on_success=False,  # _publish still needs to know what is done, should it be killed
    )
    try:
        blocks = storage.parts(work / "listing")
        dataset = ray.data.read_parquet(
            f"{root}/listing",
            filesystem=filesystem,
            override_num_blocks=len(blocks),
            num_cpus=_TASK_CPUS,
        ).map_batches(
            _Scorer,
            fn_constructor_args=(plan,),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(n_actors, len(blocks))),
            num_cpus=_ACTOR_CPUS,
        )
        with _watched(work / "scored", todo):
            dataset.write_parquet(f"{root}/scored", filesystem=filesystem, ray_remote_args={"num_cpus": _TASK_CPUS})
    finally:
        context.checkpoint_config = None
    return todo


@contextmanager
def _watched(scored: UPath, n_files: int) -> Iterator[None]:
    """Shows progress by the rows that reach storage: the only images that count as done."""
    is_over = threading.Event()
    known = {file.name for file in scored.glob("*.parquet")} if scored.exists() else set()

    def watch() -> None:
        is_last = False
        with progress("screen", n_files) as report:
            while not is_last:
                is_last = is_over.wait(_WATCH_EVERY_S)
                for file in scored.glob("*.parquet") if scored.exists() else ():
                    if file.name not in known:
                        known.add(file.name)
                        report(_n_rows([file]))

    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def _block_rows(n_rows: int, n_actors: int) -> int:
    """Rows a block: several blocks an actor, so that all end at about the same time."""
    return max(32, min(_BLOCK_ROWS, n_rows // (8 * n_actors)))


def _n_rows(files: Iterable[UPath]) -> int:
    return sum(pq.read_metadata(pa.BufferReader(file.read_bytes())).num_rows for file in files)


def _scored_rows(results: UPath, listing: pa.Table) -> pa.Table:
    """All scored rows. Raises: `InvariantError` unless they are the listing's, each exactly once."""
    files = sorted((results / outputs.WORK / "scored").glob("*.parquet"), key=lambda path: path.name)
    rows = storage.concat([pq.read_table(pa.BufferReader(file.read_bytes())) for file in files]).sort_by("key")
    if not rows["key"].equals(listing["key"]):
        raise InvariantError(
            f"{rows.num_rows:,} rows were scored of {listing.num_rows:,} files, "
            f"{pc.count_distinct(rows['key']).as_py():,} of them "
            f"different; {results} is not published: keep it and report this"
        )
    return rows


def _publish(rows: pa.Table, results: UPath) -> dict[str, FileRecord]:
    """Writes predictions/ and quarantine/, sorted by patient and image, in few files."""
    rows = rows.sort_by([("patient_id", "ascending"), ("image_id", "ascending")])
    is_ok = pc.equal(rows["status"], OK)
    predictions = rows.filter(is_ok).select(PREDICTIONS.names).cast(PREDICTIONS.arrow_schema())
    bad = rows.filter(pc.invert(is_ok)).rename_columns({"status": "reason"})
    quarantine = bad.append_column("stage", pa.repeat("screen", bad.num_rows))
    quarantine = quarantine.select(QUARANTINE.names).cast(QUARANTINE.arrow_schema())
    files: dict[str, FileRecord] = {}
    for folder, table in (("predictions", predictions), ("quarantine", quarantine)):
        storage.remove(results / folder)  # a killed earlier attempt at publishing may have left more parts
        for index, part in enumerate(shards(table, _PART_ROWS) if table.num_rows else [table]):
            name = f"{folder}/{storage.part_name(index)}"
            files[name] = storage.write_table(results / name, part)
    return files


def _write_iceberg(config: Config, results: UPath) -> None:
    """Also where the results were finished before: rows that are there already stay as they are."""
    if config.table_format == "iceberg":
        iceberg.upsert_predictions(results, catalog=config.iceberg_catalog, table=config.iceberg_table)


def _copy_run(run_path: UPath, results: UPath) -> dict[str, FileRecord]:
    """Small facts of the run, so that results can be evaluated where the run is not: its splits, history and config."""
    files: dict[str, FileRecord] = {}
    for name in ("splits.parquet", "history.parquet", "config.json", "_SUCCESS.json"):
        target = results / "model" / name.lstrip("_")
        storage.write_bytes(target, (run_path / name).read_bytes())
        files[f"model/{target.name}"] = storage.record_of(target)
    return files


def _counts(rows: pa.Table) -> dict[str, Any]:
    reasons = Counter(status for status in rows["status"].to_pylist() if status != OK)
    n_parasitized = pc.sum(rows["predicted_label"]).as_py() or 0
    return {
        "n_files": rows.num_rows,
        "n_scored": rows.num_rows - sum(reasons.values()),
        "n_quarantined": sum(reasons.values()),
        "quarantine_reasons": dict(reasons.most_common()),
        "n_called_parasitized": n_parasitized,
    }


def _check_bad_fraction(counts: dict[str, Any], results: UPath, allowed: float) -> None:
    if counts["n_quarantined"] > allowed * counts["n_files"]:
        raise TooManyBadImagesError(
            f"{counts['n_quarantined']:,} of {counts['n_files']:,} files cannot be used "
            f"({counts['quarantine_reasons']}), more than "
            f"--max-bad-fraction {allowed}; look at {results / 'quarantine'}, then correct the archive or run again "
            f"with a larger "
            "fraction, which scores nothing anew"
        )


def _print_summary(success: dict[str, Any]) -> None:
    counts = success["counts"]
    table = RichTable(
        "",
        "images",
        title=f"results of {success['run_id']}" + (" (synthetic)" if success["is_synthetic"] else ""),
    )
    table.add_row("files", f"{counts['n_files']:,}")
    table.add_row("scored", f"{counts['n_scored']:,}")
    table.add_row(
        f"called {Label.parasitized.name} (score ≥ {success['threshold']:g})",
        f"{counts['n_called_parasitized']:,}",
    )
    table.add_row("in quarantine", f"{counts['n_quarantined']:,}")
    out = console()
    out.print(table)
    for reason, n in counts["quarantine_reasons"].items():
        out.print(f"  quarantine {reason}: {n:,}")
    out.print(RESEARCH_ONLY)
