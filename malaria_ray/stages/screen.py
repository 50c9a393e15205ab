"""screen: an archive or dataset, and a run, become results: one score per image, one row per file."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, DataContext
from rich.table import Table as RichTable
from tyro.conf import Positional
from upath import UPath

import malaria_ray
from malaria_ray.archives import open_archive
from malaria_ray.archives.datasets import DatasetArchive
from malaria_ray.archives.listing import check_same_listing, list_archive, listing_digest
from malaria_ray.archives.patients import patient_rule
from malaria_ray.archives.replaced import check_unchanged, forget_replaced, states_digest
from malaria_ray.cells.images import PREPROCESSING
from malaria_ray.cells.synthetic import has_synthetic
from malaria_ray.errors import ConfigError, ModelError
from malaria_ray.models.engines import MODEL_FILE, EngineName, gpu_fault, read_run_file
from malaria_ray.runtime import iceberg, outputs, storage
from malaria_ray.runtime.redaction import without_secrets
from malaria_ray.runtime.session import may_grow, ray_session, room_for
from malaria_ray.runtime.storage import FileRecord
from malaria_ray.runtime.terminal import console, progress
from malaria_ray.schema import LISTING, OK, RESEARCH_ONLY, Label, Split
from malaria_ray.stages import ledger, publishing
from malaria_ray.stages.refusals import check_few_refused, check_fraction
from malaria_ray.stages.scorers import Scorer, ScoringPlan, decode_block
from malaria_ray.statistics.validation import Validation

log = logging.getLogger("malaria_ray")

_BLOCK_ROWS = 1024  # what one actor takes at a time, and at most loses when it is killed
_WATCH_EVERY_S = 2.0
_QUIET_S = 120.0
_QUIET = (
    "screen: nothing was finished for %.0f s; the workers may wait for nodes, for storage or for room on a disk "
    "(--debug shows what Ray says)"
)
_TASK_CPUS = 0.05  # of the tasks that write rows: they wait for storage
_WRITERS = 2  # of those tasks at a time for each actor on CPUs: else, as actors end, Ray starts a process for each
_ACTOR_CPUS = 0.9  # instead of 1: leaves room on every node for those tasks


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
    engine: EngineName | None = None
    """ncnn: convolutions by ncnn, fastest on CPUs, the default there; onnx: all by ONNX Runtime, the default on GPUs,
    and what takes ncnn's place where the two disagree; keras: by Keras. All compute in float32."""
    patients: tuple[str, ...] = ()
    """Patient mapping files of an archive, as for 'ingest'."""
    patient_pattern: str | None = None
    """Rule for patients in the paths of an archive, as for 'ingest'."""
    batch_size: int = 64
    """Images that the model takes at a time; a GPU likes 256."""
    num_actors: str | None = None
    """Scoring processes: N, or MIN-MAX for as many as the cluster has room for; by default as many as fit now."""
    cpus_per_actor: int = 1
    """CPUs, and threads of the network, of each of them; 1 is fastest on CPUs."""
    gpus_per_actor: float = 0
    """GPUs of each of them, 0.5 for two on one; tasks on CPUs then read and decode for them."""
    max_bad_fraction: float = 0.5
    """Fail when more than this share of the files ends in quarantine."""
    table_format: Literal["parquet", "iceberg"] = "parquet"
    """iceberg: the predictions also as rows of an Iceberg table, in place of those of the same run and image."""
    iceberg_catalog: str | None = None
    """Catalog of pyiceberg's configuration (~/.pyiceberg.yaml); by default one in RESULTS/iceberg."""
    iceberg_table: str = iceberg.DEFAULT_TABLE
    """Its namespace and name."""
    retry_quarantined: Literal["unreadable", "all"] | None = None
    """Score again the quarantined files of these results: those that storage did not give, or all."""
    overwrite: bool = False
    """Delete the results first if they are there."""

    def __post_init__(self) -> None:
        for name, value in (("--batch-size", self.batch_size), ("--cpus-per-actor", self.cpus_per_actor)):
            if value < 1:
                raise ConfigError(f"{name} {value}: must be at least 1")
        least, most = self.actor_range or (1, 1)
        if not 1 <= least <= most:
            raise ConfigError(f"--num-actors {self.num_actors}: allowed are N or MIN-MAX, at least 1")
        gpus = self.gpus_per_actor
        if not (0 <= gpus <= 1 or gpus == int(gpus) > 0):
            raise ConfigError(f"--gpus-per-actor {gpus:g}: allowed are 0 to 1 and whole numbers")
        if gpus and self.engine == "ncnn":
            raise ConfigError("--engine ncnn computes on CPUs; leave --gpus-per-actor away, or the engine")
        check_fraction(self.max_bad_fraction)
        if self.overwrite and self.retry_quarantined:
            raise ConfigError("--retry-quarantined keeps what --overwrite would delete; give one of them")

    @property
    def engine_name(self) -> EngineName:
        """The engine, where none is given the fastest."""
        return self.engine or ("onnx" if self.gpus_per_actor else "ncnn")

    @property
    def actor_range(self) -> tuple[int, int] | None:
        """Least and most actors; None where the cluster decides."""
        if self.num_actors is None:
            return None
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.num_actors)
        if found is None:
            return 0, 0
        return int(found[1]), int(found[2] or found[1])


@outputs.one_writer()
def run(config: Config) -> None:
    """Makes the results; does nothing where they are finished; goes on where an earlier run of the same config
    stopped.
    """
    begun = time.monotonic()
    results, run_path = storage.locate(config.results), storage.locate(config.model)
    if config.table_format == "iceberg":
        iceberg.check_iceberg(results, config.iceberg_catalog, config.iceberg_table)
    trained = outputs.check_complete(run_path, "train")
    if "validation.json" not in trained["files"]:
        raise ModelError(f"{run_path} was trained by an older malaria_ray and has no validation.json; train it anew")
    archive = open_archive(config.source)
    if isinstance(archive, DatasetArchive) and archive.image_size != trained["image_size"]:
        raise ModelError(
            f"{config.source} holds crops of {archive.image_size} × {archive.image_size} pixels, the model of "
            f"{config.model} takes "
            f"{trained['image_size']} × {trained['image_size']}; screen the archive itself, or a dataset of that "
            f"--image-size"
        )
    rule = patient_rule(config.patients, config.patient_pattern)
    model_file = MODEL_FILE[config.engine_name]
    identity = {
        **archive.identity(),
        **rule.identity,
        "run_id": trained["run_id"],
        "model_digest": trained["files"][model_file]["sha256"],
        "engine": config.engine_name,
        "split": str(config.split),
        "threshold": trained["threshold"],
        "preprocessing": PREPROCESSING,
        "malaria_ray": malaria_ray.__version__,
    }
    claim = outputs.claim(
        results,
        stage="screen",
        config=config,
        identity=identity,
        overwrite=config.overwrite,
        inputs=(archive.url, config.model, *config.patients),
    )
    finished = outputs.check_complete(results, "screen") if claim is None else None
    retried = publishing.to_retry(results, config.retry_quarantined, finished)
    if finished is not None and not retried:
        log.info("%s is finished; nothing to do (--overwrite scores anew, with images added since)", results)
        _write_iceberg(config, results)
        _print_summary(finished)
        return

    read_run_file(run_path / model_file, sha256=trained["files"][model_file]["sha256"])
    facts_of_run = _facts_of_run(run_path, trained["files"])
    validation = Validation.from_dict(json.loads(facts_of_run["validation.json"]))
    listing = list_archive(archive, patients=rule.of_file, pattern=rule.pattern)
    listing = _of_split(listing, run_path, trained, config.split)
    log.info("%s: %s images to screen with %s", archive.url, f"{listing.num_rows:,}", trained["run_id"])
    facts = {
        "listing_digest": listing_digest(listing),
        "containers_digest": states_digest(archive.states),
        "is_synthetic": has_synthetic(listing["image_id"]),
    }
    n_files = listing.num_rows
    listed = time.monotonic()
    with ray_session():
        connected, connected_at = time.monotonic(), time.time()
        plan = ScoringPlan(
            model_file=storage.as_url(run_path / model_file),
            model_sha256=trained["files"][model_file]["sha256"],
            engine=config.engine_name,
            image_size=trained["image_size"],
            batch_size=config.batch_size,
            n_threads=config.cpus_per_actor,
            use_gpu=config.gpus_per_actor > 0,
            threshold=trained["threshold"],
            temperature=validation.calibration.temperature,
            novelty_file=storage.as_url(run_path / "novelty.npz"),
            novelty_sha256=trained["files"]["novelty.npz"]["sha256"],
            model=trained["model"],
            run_id=trained["run_id"],
        )
        pool = _pool(config)
        if claim is not None:  # all that could refuse the work has had its say
            claim.begin()
        elif finished is not None:
            outputs.hold_finished(results, "screen", finished)
        if retried:
            is_same = finished is not None and finished.get("containers_digest") == facts["containers_digest"]
            states = archive.states if is_same else {}
            publishing.reopen(results, retried, listing, finished=finished, states=states)
        work = outputs.work_of(results, "screen")
        check_same_listing(work, listing)
        forget_replaced(
            work,
            archive,
            listing,
            done=lambda: ledger.read_files(ledger.committed_files(work).values(), ["image_id", "content_digest"]),
            forget=lambda files: ledger.forget(work, files["image_id"].combine_chunks()),
        )
        files = outputs.write_table(results, "listing.parquet", _without_secrets(listing), stage="screen")
        n_scored = _score_all(listing, results, plan, config, pool)
        check_unchanged(work, archive, listing)
        n_actors = min(pool[1], max(1, _room(config)))  # those that there was room for
        scored = time.monotonic()
    del listing  # what the driver holds grows with the archive: no more of it than is needed

    with publishing.scored_rows(results, n_files) as rows:
        outputs.check_held(results)
        files |= publishing.publish(rows, results)
        counts = publishing.counts_of(rows)
        rates = (
            publishing.rates_of(rows, since=connected_at, seconds=scored - connected, n_actors=n_actors)
            if n_scored
            else {}
        )
    if others := sum(n for name, n in rates.get("engines", {}).items() if name != config.engine_name):
        log.warning(
            "%s files were scored by ONNX Runtime alone, slower: on their nodes ncnn is missing or computes otherwise "
            "(the logs of Ray's workers there say which)",
            f"{others:,}",
        )
    files |= _write_facts(facts_of_run, results)
    check_few_refused(
        counts["quarantine_reasons"],
        counts["n_files"],
        allowed=config.max_bad_fraction,
        what_to_do=f"look at {results / 'quarantine'}, then run again with --retry-quarantined unreadable (all, where "
        "files of a folder were corrected; a mended .zip, .tar or .parquet is another archive), or with a larger "
        "fraction, which scores nothing anew",
    )
    _write_iceberg(config, results)
    outputs.finish(
        results,
        counts=counts,
        files=files,
        run_id=trained["run_id"],
        model=trained["model"],
        threshold=trained["threshold"],
        **facts,
        timings={
            "listing_s": round(listed - begun, 2),
            "ray_start_s": round(connected - listed, 2),
            "scoring_s": round(scored - connected, 2),
            "publishing_s": round(time.monotonic() - scored, 2),
            "total_s": round(time.monotonic() - begun, 2),
            "images_scored": n_scored,
            "images_per_second": round(n_scored / (scored - connected), 1),
            **rates,
        },
    )
    _print_summary(storage.read_json(results / outputs.SUCCESS))
    log.info("results: %s", results)


def _facts_of_run(run_path: UPath, files: dict[str, FileRecord]) -> dict[str, bytes]:
    """Small files of the run, so that results can be evaluated where the run is not: its splits, history and config.

    Raises: `ModelError` where one of them is not the file that training wrote.
    """
    facts = {
        name: read_run_file(run_path / name, sha256=files[name]["sha256"])
        for name in ("splits.parquet", "history.parquet", "validation.json")
    }
    return facts | {name: (run_path / name).read_bytes() for name in ("config.json", "_SUCCESS.json")}


def _of_split(listing: pa.Table, run_path: UPath, trained: dict[str, Any], split: Split | Literal["all"]) -> pa.Table:
    """The rows of one split of the run. Raises: `ConfigError` where none of the images is in it."""
    if split == "all":
        return listing
    splits = outputs.read_written(run_path, trained, "splits.parquet", ["image_id", "split"])
    chosen = splits.filter(pc.equal(splits["split"], str(split)))["image_id"]
    kept = listing.filter(pc.is_in(listing["image_id"], value_set=chosen.combine_chunks()))
    if not kept.num_rows:
        raise ConfigError(
            f"none of the {listing.num_rows:,} images is in the {split} split of {run_path}, whose names look like "
            f"{splits['image_id'][0].as_py()!r}; --split needs the dataset or archive that the run was trained from"
        )
    return kept.set_column(0, "key", pa.array(np.arange(kept.num_rows)))


def _without_secrets(listing: pa.Table) -> pa.Table:
    """The listing as others may read it: a signed URL opens the archive to whoever knows it."""
    encoded = listing["container"].chunks
    told = [pa.array([without_secrets(url) for url in chunk.dictionary.to_pylist()], pa.string()) for chunk in encoded]
    column = pa.chunked_array([urls.take(chunk.indices) for urls, chunk in zip(told, encoded, strict=True)])
    return listing.set_column(LISTING.names.index("container"), LISTING.arrow_schema().field("container"), column)


def _pool(config: Config) -> tuple[int, int]:
    """Least and most scoring actors. Raises: `ConfigError` where no node has room for one, and none is waited for."""
    gpus, cpus = config.gpus_per_actor, config.cpus_per_actor
    if not _room(config):
        asked = f"--gpus-per-actor {gpus:g}" if gpus else f"--cpus-per-actor {cpus}"
        have = f"no node has so many {'GPUs' if gpus else 'CPUs'}"
        is_awaited = config.num_actors or (cpus == 1 and not gpus)  # with one of those an autoscaler starts
        if not (is_awaited and may_grow()):
            way = ", or give --num-actors where such nodes are started when they are asked for" if may_grow() else ""
            raise ConfigError(f"{asked}: {have}; lower it{way}")
        log.info("waiting for nodes: %s asks for more than those that are there have", asked)
    if gpus:
        probe = ray.remote(gpu_fault).options(num_gpus=gpus, num_cpus=0)
        fault = ray.get(probe.remote(config.engine_name))
        if fault:
            log.warning("%s: the network is computed on CPUs (cluster/README.md says what a GPU needs)", fault)
    room = _room(config)
    if config.actor_range and room < config.actor_range[1]:
        log.info("--num-actors %s: there is room for %d now", config.num_actors, room)
    return config.actor_range or (max(1, room),) * 2


def _room(config: Config) -> int:
    """How many scoring actors the nodes that are there have room for."""
    return room_for(cpus=0 if config.gpus_per_actor else config.cpus_per_actor, gpus=config.gpus_per_actor)


def _score_all(listing: pa.Table, results: UPath, plan: ScoringPlan, config: Config, pool: tuple[int, int]) -> int:
    """Scores what no earlier run finished, and leaves the rows in the work folder; returns how many were scored now."""
    work = outputs.work_of(results, "screen")
    done = ledger.keys_done(work)
    if len(done):
        log.info("%s of %s images were scored before", f"{len(done):,}", f"{listing.num_rows:,}")
        listing = listing.filter(pc.invert(pc.is_in(listing["key"], value_set=pa.array(done))))
    n_left: int = listing.num_rows
    if not n_left:
        return 0
    rows = _block_rows(n_left, pool[1], plan.batch_size)
    tail = 2 * pool[1] * rows
    blocks = ledger.write_blocks(listing, work, block_rows=rows, tail_rows=tail, multiple=plan.batch_size)
    del listing
    filesystem, root = storage.arrow_filesystem(work)
    context = DataContext.get_current()
    context.checkpoint_config = ledger.checkpoint_of(work)
    actors: dict[str, Any] = {
        "compute": ActorPoolStrategy(min_size=min(pool[0], len(blocks)), max_size=min(pool[1], len(blocks))),
        "num_cpus": _ACTOR_CPUS if plan.n_threads == 1 else plan.n_threads,
    }
    as_tables: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    try:
        source = ledger.BlockSource(blocks)
        if plan.use_gpu:
            dataset = ray.data.read_datasource(source, override_num_blocks=len(blocks), num_cpus=1)
            sizes = {"image_size": plan.image_size, "batch_size": plan.batch_size}
            dataset = dataset.map_batches(decode_block, fn_kwargs=sizes, num_cpus=1, **as_tables)
            actors |= {"num_cpus": _TASK_CPUS, "num_gpus": config.gpus_per_actor, "batch_size": rows}
        else:  # the same resources as the actors': Ray then makes one operator of reading and scoring
            dataset = ray.data.read_datasource(source, override_num_blocks=len(blocks), num_cpus=actors["num_cpus"])
        dataset = dataset.map_batches(Scorer, fn_constructor_args=(plan,), **as_tables | actors)
        with _watched(work, n_left):
            dataset.write_parquet(
                f"{root}/scored",
                filesystem=filesystem,
                ray_remote_args={"num_cpus": _TASK_CPUS},
                concurrency=None if plan.use_gpu else _WRITERS * pool[1],
            )
        log.debug("%s", dataset.stats())
        storage.remove(work / "listing")  # done with, and the one place where a signed URL is written whole
    finally:
        context.checkpoint_config = None
    return n_left


@contextmanager
def _watched(work: UPath, n_files: int) -> Iterator[None]:
    """Shows progress by the rows that are committed to storage: the only images that count as done."""
    is_over = threading.Event()
    known = ledger.committed_files(work).keys()
    n_bad = 0

    def look(report: Any) -> None:
        nonlocal known, n_bad
        files = ledger.committed_files(work)
        # All of them before any is counted: a look that storage cuts short is looked again as a whole.
        for rows in list(ledger.read_files([files[name] for name in files.keys() - known], ["status"])):
            n_bad += rows.num_rows - pc.sum(pc.equal(rows["status"], OK)).as_py()
            report(rows.num_rows, f"{n_bad:,} in quarantine" if n_bad else "")
        known = files.keys()

    def watch() -> None:
        is_last = False
        with progress("screen", n_files) as report:
            n_seen, since = len(known), time.monotonic()
            while not is_last:
                is_last = is_over.wait(_WATCH_EVERY_S)
                try:
                    look(report)
                except Exception as error:  # a look that storage refused: the next one sees the same files
                    log.debug("progress is not known: %s", error)
                if len(known) > n_seen:
                    n_seen, since = len(known), time.monotonic()
                elif time.monotonic() - since > _QUIET_S:
                    log.warning(_QUIET, _QUIET_S)
                    since = time.monotonic()

    watcher = threading.Thread(target=watch, name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def _block_rows(n_rows: int, n_actors: int, batch_size: int) -> int:
    """Rows a block: several blocks an actor, and whole batches, for a padded one costs as much as a full one."""
    rows = max(1, min(_BLOCK_ROWS, n_rows // (4 * n_actors)))
    return max(1, rows // batch_size) * batch_size


def _write_iceberg(config: Config, results: UPath) -> None:
    """Idempotent: rows that are in the table stay as they are."""
    if config.table_format == "iceberg":
        iceberg.upsert_predictions(results, catalog=config.iceberg_catalog, table=config.iceberg_table)


def _write_facts(facts: dict[str, bytes], results: UPath) -> dict[str, FileRecord]:
    files: dict[str, FileRecord] = {}
    for name, data in facts.items():
        target = results / "model" / name.lstrip("_")
        storage.write_bytes(target, data)
        files[f"model/{target.name}"] = storage.record_of(target)
    return files


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
