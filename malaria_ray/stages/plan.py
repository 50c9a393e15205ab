"""plan: what a screening would read and cost, from the listing and a sample scored on this machine."""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table as RichTable
from tyro.conf import Positional

from malaria_ray.archives import open_archive
from malaria_ray.archives.datasets import DatasetArchive
from malaria_ray.archives.listing import list_archive, shards
from malaria_ray.archives.patients import patient_rule
from malaria_ray.archives.reading import read_cells, read_files
from malaria_ray.cells.images import Pixels, decode, resize
from malaria_ray.cells.patients import file_names
from malaria_ray.errors import ConfigError, ImageRefused, ModelError, ReadError
from malaria_ray.models.engines import MODEL_FILE, EngineName, open_engine, read_run_file
from malaria_ray.runtime import outputs, storage
from malaria_ray.runtime.redaction import without_secrets
from malaria_ray.runtime.seeds import check_seed
from malaria_ray.runtime.session import n_cpus, ray_session
from malaria_ray.runtime.terminal import console
from malaria_ray.schema import Label, Reason

log = logging.getLogger("malaria_ray")

_BATCH_ROWS = 100_000
_RUN_ROWS = 32  # the sample is taken in runs of neighbours: that is how a screening reads
_READ_AS = ("file", "stored", "deflate", "tar", "parquet", "crops")
_START_S = 10  # imports, Ray, the actors, publishing: 9 s on two idle cores (tests/benchmarks/start.py)
_EFFICIENCY = 0.85  # of the bare work's rate; two cores reached 0.80 - 0.92 (tests/benchmarks/screening.py)
_WORKER_BYTES = 350 * 10**6  # a Ray worker with NumPy, Arrow, OpenCV and ONNX Runtime loaded, before any model
_READING_BYTES = 64 * 10**6  # what is read and decoded at a time


@dataclass(frozen=True, kw_only=True)
class Config:
    """Says what 'screen' would read and how long it would take, before it costs anything. Writes nothing."""

    source: Positional[str]
    """Archive or dataset."""
    model: str
    """Run made by 'malaria-ray train'."""
    engine: EngineName = "ncnn"
    """As for 'screen'."""
    batch_size: int = 64
    """As for 'screen'."""
    num_actors: int | None = None
    """Estimate for this many scoring processes with a CPU each; by default the CPUs of the cluster at RAY_ADDRESS, else
    of this machine."""
    patients: tuple[str, ...] = ()
    """Patient mapping files, as for 'ingest'."""
    patient_pattern: str | None = None
    """Rule for patients in the paths, as for 'ingest'."""
    sample: int = 256
    """Images to read, decode and score."""
    seed: int = 42
    """Seed of their choice."""
    json: bool = False
    """Print JSON instead of tables."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name, value in (
            ("--batch-size", self.batch_size),
            ("--num-actors", self.num_actors),
            ("--sample", self.sample),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}: must be at least 1")


def run(config: Config) -> None:
    """Prints the plan."""
    run_path = storage.locate(config.model)
    trained = outputs.check_complete(run_path, "train")
    rule = patient_rule(config.patients, config.patient_pattern)
    archive = open_archive(config.source)
    if isinstance(archive, DatasetArchive) and archive.image_size != trained["image_size"]:
        raise ModelError(
            f"{config.source} holds crops of {archive.image_size} × {archive.image_size} pixels, the model takes "
            f"{trained['image_size']} × {trained['image_size']}; plan for the archive itself, or a dataset of that "
            "--image-size"
        )
    begun = time.monotonic()
    listing = list_archive(archive, patients=rule.of_file, pattern=rule.pattern)
    listing_s = time.monotonic() - begun
    log.info("%s: %s files listed in %.1f s", archive.url, f"{listing.num_rows:,}", listing_s)
    found = describe(listing)
    if isinstance(archive, DatasetArchive):  # its crops, not the files that they were made from
        found["n_bytes"] = sum(
            record["bytes"] for name, record in archive.success["files"].items() if name.startswith("crops/")
        )
    sample = choose(listing, config.sample, seed=config.seed)
    file = MODEL_FILE[config.engine]
    model = read_run_file(run_path / file, sha256=trained["files"][file]["sha256"])
    measured = measure(
        sample,
        model,
        engine=config.engine,
        image_size=trained["image_size"],
        batch_size=config.batch_size,
    )
    plan = {
        "source": without_secrets(archive.url),
        "run_id": trained["run_id"],
        "engine": measured["engine"],
        "image_size": trained["image_size"],
        "listing_s": round(listing_s, 2),
        **found,
        "sample": measured,
        **estimate(found, measured, n_actors=config.num_actors or _n_cpus(), listing_bytes=listing.nbytes),
    }
    if config.json:
        print(json.dumps(plan, indent=2, ensure_ascii=False))
    else:
        _print(plan)


def describe(listing: pa.Table) -> dict[str, Any]:
    """What the listing says: files, bytes, endings, ways of packing, labels, patients."""
    endings: Counter[str] = Counter()
    for batch in shards(listing, _BATCH_ROWS):
        found = pc.extract_regex(pc.utf8_lower(file_names(batch["image_id"])), r"(?P<ending>\.[^.]{1,8})$")
        endings.update({ending or "none": n for ending, n in _counted(pc.struct_field(found, "ending")).items()})
    methods = _counted(listing["method"])
    labels = _counted(listing["label"])
    names = {label.value: label.name for label in Label}
    return {
        "n_files": listing.num_rows,
        "n_bytes": pc.sum(pc.coalesce(listing["n_bytes"], listing["packed_bytes"])).as_py() or 0,
        "endings": dict(endings.most_common(10)),
        "read_as": {method: n for method, n in methods.items() if method in _READ_AS},
        "not_readable": {method: n for method, n in methods.items() if method not in _READ_AS},
        "labels": {names.get(value, "unlabelled"): n for value, n in labels.items()},
        "n_patients": pc.count_distinct(listing["patient_id"], mode="only_valid").as_py(),
        "n_without_patient": listing["patient_id"].null_count,
    }


def _counted(column: pa.Array | pa.ChunkedArray) -> dict[Any, int]:
    return {pair["values"]: pair["counts"] for pair in pc.value_counts(column).to_pylist()}


def choose(listing: pa.Table, n: int, *, seed: int) -> pa.Table:
    """`n` rows in runs of neighbours, spread over the listing."""
    if n >= listing.num_rows:
        return listing
    n_runs = -(-n // _RUN_ROWS)
    chance = np.random.default_rng([seed])
    bounds = np.linspace(0, listing.num_rows, n_runs + 1).astype(int)
    rows: list[int] = []
    for low, high in itertools.pairwise(bounds):
        start = int(chance.integers(low, max(low + 1, high - _RUN_ROWS)))
        rows += range(start, min(start + _RUN_ROWS, int(high)))
    return listing.take(rows[:n])


def measure(sample: pa.Table, model: bytes, *, engine: EngineName, image_size: int, batch_size: int) -> dict[str, Any]:
    """Seconds an image of reading, decoding with resizing, and the forward pass, by one thread of this machine."""
    reasons: Counter[str] = Counter()
    before = _resident_bytes()
    n, begun = sample.num_rows, time.monotonic()
    decode_s = 0.0
    if sample["method"][0].as_py() == "crops":
        pixels = read_cells(sample, image_size=image_size).pixels
    else:
        pixels = np.empty((n, image_size, image_size, 3), np.uint8)
        n_usable = 0
        for data in read_files(sample):
            read = time.monotonic()
            try:
                if isinstance(data, ReadError):
                    raise data
                resize(decode(data), image_size, out=pixels[n_usable])
                n_usable += 1
            except (ImageRefused, ReadError) as refusal:
                reasons[refusal.reason.value] += 1
            decode_s += time.monotonic() - read
        pixels = pixels[:n_usable]
    read_s = time.monotonic() - begun - decode_s
    if not len(pixels):
        raise ConfigError(
            f"none of the {sample.num_rows:,} sampled files can be used ({dict(reasons)}); look at the archive, or "
            "take a larger --sample"
        )
    computed_by, forward_s, load_s = _forward(pixels, model, engine=engine, batch_size=batch_size)
    return {
        "engine": computed_by,
        "n": n,
        "n_usable": len(pixels),
        "reasons": dict(reasons.most_common()),
        "read_s": read_s / n,
        "decode_s": decode_s / n,
        "forward_s": forward_s * len(pixels) / n,
        "load_s": round(load_s, 2),
        "grown_bytes": max(0, _resident_bytes() - before - 2 * pixels.nbytes),  # less the sample itself and its copy
    }


def _forward(pixels: Pixels, model: bytes, *, engine: EngineName, batch_size: int) -> tuple[EngineName, float, float]:
    """(what computed, seconds an image in full batches, seconds until the engine was there)."""
    begun = time.monotonic()
    network = open_engine(engine, model, n_threads=1, batch_size=batch_size)
    loaded = time.monotonic()
    n = -(-len(pixels) // batch_size) * batch_size
    full = pixels[np.arange(n) % len(pixels)]
    network.score(full[:batch_size])  # the first batch allocates
    warm = time.monotonic()
    network.score(full)
    return network.name, (time.monotonic() - warm) / n, loaded - begun


def estimate(found: dict[str, Any], measured: dict[str, Any], *, n_actors: int, listing_bytes: int) -> dict[str, Any]:
    """Time and memory of a whole screening by `n_actors` processes with a CPU each."""
    costs = {part: measured[f"{part}_s"] for part in ("read", "decode", "forward")}
    per_image = sum(costs.values())
    bottleneck = max(costs, key=lambda part: costs[part])
    rate = n_actors * _EFFICIENCY / per_image
    per_actor = _WORKER_BYTES + measured["grown_bytes"] + _READING_BYTES
    return {
        "bottleneck": bottleneck,
        "n_actors": n_actors,
        "ceiling_images_per_second": round(n_actors / per_image, 1),
        "images_per_second": round(rate, 1),
        "estimated_s": round(_START_S + found["n_files"] / rate, 1),
        "memory": {
            "per_actor_bytes": per_actor,
            "driver_bytes": _WORKER_BYTES + 3 * listing_bytes,
            "all_bytes": n_actors * per_actor + _WORKER_BYTES + 3 * listing_bytes,
        },
    }


def _n_cpus() -> int:
    """CPUs of the cluster that a screening would join, without starting a Ray for it."""
    if os.environ.get("RAY_ADDRESS"):
        with ray_session():
            return n_cpus()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resident_bytes() -> int:
    """Memory of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


_ADVICE = {
    "read": "reading waits for storage: pack the archive ('malaria-ray pack'), bring it nearer, or take more actors",
    "decode": "decoding takes most: more CPUs help in proportion; a GPU does not",
    "forward": "the network takes most: more CPUs help in proportion, a GPU or a smaller model by more",
}


def _print(plan: dict[str, Any]) -> None:
    out = console()
    files = RichTable("", "", title=f"{plan['source']} would be read")
    files.add_row("files", f"{plan['n_files']:,}")
    files.add_row("megabytes", f"{plan['n_bytes'] / 1e6:,.1f}")
    for title in ("endings", "read_as", "not_readable", "labels"):
        if plan[title]:
            files.add_row(title.replace("_", " "), ", ".join(f"{name} {n:,}" for name, n in plan[title].items()))
    without = f" ({plan['n_without_patient']:,} files without)" if plan["n_without_patient"] else ""
    files.add_row("patients", f"{plan['n_patients']:,}{without}")
    out.print(files)
    sample = plan["sample"]
    costs = RichTable("one image, one CPU", "ms", "share", title=f"{sample['n']:,} images tried with {plan['run_id']}")
    parts = {part: sample[f"{part}_s"] for part in ("read", "decode", "forward")}
    for part, seconds in parts.items():
        costs.add_row(part, f"{1e3 * seconds:,.2f}", f"{seconds / sum(parts.values()):.0%}")
    out.print(costs)
    for reason, n in sample["reasons"].items():
        meaning = "could not be read from storage" if reason == Reason.UNREADABLE else "would be in quarantine"
        out.print(f"  {reason}: {n:,} of {sample['n']:,} {meaning}")
    memory = {name: f"{n / 1e9:.1f} GB" for name, n in plan["memory"].items()}
    out.print(
        f"{plan['n_actors']} actors: about {plan['images_per_second']:,.0f} images/s, {_duration(plan['estimated_s'])} "
        f"in all; {memory['per_actor_bytes']} of memory an actor, {memory['driver_bytes']} the driver, "
        f"{memory['all_bytes']} together",
        soft_wrap=True,
    )
    out.print(f"bottleneck: {plan['bottleneck']}; {_ADVICE[plan['bottleneck']]}", soft_wrap=True)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
