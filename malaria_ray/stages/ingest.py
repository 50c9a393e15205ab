"""ingest: an archive becomes a dataset. List → read → decode → resize → one row per file, good or bad."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import ray
from rich.table import Table as RichTable
from tyro.conf import Positional
from upath import UPath

from malaria_ray.archives import open_archive
from malaria_ray.archives.datasets import DatasetArchive
from malaria_ray.archives.listing import check_same_listing, list_archive, listing_digest
from malaria_ray.archives.patients import patient_rule
from malaria_ray.archives.reading import read_cells
from malaria_ray.archives.replaced import check_unchanged, forget_replaced
from malaria_ray.cells.crops import crop_pixels, crops_column
from malaria_ray.cells.images import PREPROCESSING, Pixels
from malaria_ray.cells.splits import SplitBy, assign_splits, check_trainable
from malaria_ray.cells.synthetic import has_synthetic
from malaria_ray.errors import ArchiveError, ConfigError, InvariantError
from malaria_ray.runtime import outputs, storage
from malaria_ray.runtime.seeds import check_seed
from malaria_ray.runtime.session import ray_session
from malaria_ray.runtime.storage import FileRecord
from malaria_ray.runtime.terminal import console, progress
from malaria_ray.schema import MANIFEST, OK, QUARANTINE, Label, crops_table
from malaria_ray.stages.refusals import check_few_refused, check_fraction

log = logging.getLogger("malaria_ray")

_SHARD_ROWS = 1024  # a task's unit of work and of resumption: about half a second of decoding, 20 MB of crops
_CROPS_ROW_GROUP = 128  # 6 MB of pixels: a gallery reads a few crops without the whole part
_N_SAMPLES = 24


@dataclass(frozen=True, kw_only=True)
class Config:
    """Reads an archive of cell images and writes a dataset: resized crops, a manifest, a quarantine and a summary."""

    archive: Positional[str]
    """Folder, .zip, .tar, .parquet or fsspec URL of one; 'nih' is the official download."""
    dataset: Positional[str]
    """Directory to write, made if missing."""
    patients: tuple[str, ...] = ()
    """Patient mapping files in the official NIH format; else patients come from the file names."""
    patient_pattern: str | None = None
    """Regular expression with a group named 'patient', searched in the path; replaces the NIH rule."""
    image_size: int = 125
    """Side of the resized crops in pixels."""
    split_by: SplitBy | None = None
    """Summarise only the training split that 'train --split-by' would make; all images otherwise."""
    seed: int = 42
    """Seed of that split."""
    max_bad_fraction: float = 0.5
    """Fail when more than this share of the files ends in quarantine."""
    overwrite: bool = False
    """Delete the dataset first if it is there."""

    def __post_init__(self) -> None:
        if not 16 <= self.image_size <= 1024:
            raise ConfigError(f"--image-size {self.image_size}: allowed are 16 to 1024 pixels")
        check_fraction(self.max_bad_fraction)
        check_seed(self.seed)


@outputs.one_writer()
def run(config: Config) -> None:
    """Makes the dataset; does nothing where it is finished; goes on where an earlier run of the same config stopped."""
    begun = time.monotonic()
    dataset = storage.locate(config.dataset)
    rule = patient_rule(config.patients, config.patient_pattern)  # before an archive that may be a download
    archive = open_archive(config.archive)
    if isinstance(archive, DatasetArchive):
        raise ArchiveError(f"{config.archive} is a dataset already; ingest reads archives of image files")
    identity = {
        **archive.identity(),
        "image_size": config.image_size,
        "preprocessing": PREPROCESSING,
        **rule.identity,
    }
    claim = outputs.claim(
        dataset,
        stage="ingest",
        config=config,
        identity=identity,
        overwrite=config.overwrite,
        inputs=(archive.url, *config.patients),
    )
    if claim is None:
        log.info("%s is finished; nothing to do (--overwrite makes it anew, with images added since)", dataset)
        finished = outputs.check_complete(dataset, "ingest")
        print_summary(_summary(outputs.read_written(dataset, finished, "manifest.parquet"), config))
        return

    listing = list_archive(archive, patients=rule.of_file, pattern=rule.pattern)
    if config.split_by:  # now, and not when all is decoded
        check_trainable(listing.select(["image_id", "label", "patient_id"]).to_pandas(), by=config.split_by)
    claim.begin()
    work = outputs.work_of(dataset, "ingest")
    check_same_listing(work, listing)
    forget_replaced(
        work,
        archive,
        listing,
        done=lambda: [
            storage.read_table(part, ["image_id", "content_digest"]) for part in storage.parts(work / "manifest")
        ],
        forget=partial(_forget, work),
    )
    log.info("%s: %s files", archive.url, f"{listing.num_rows:,}")
    listed = time.monotonic()
    with ray_session():
        connected = time.monotonic()
        n_read = _decode_all(listing, dataset, image_size=config.image_size)
        check_unchanged(work, archive, listing)
        decoded = time.monotonic()

    outputs.check_held(dataset)
    manifest, files = _publish(dataset, listing["image_id"])
    check_few_refused(
        dict(Counter(status for status in manifest["status"].to_pylist() if status != OK).most_common()),
        manifest.num_rows,
        allowed=config.max_bad_fraction,
        what_to_do=f"look at {dataset / 'quarantine'}, then correct the archive or run again with a larger fraction, "
        "which decodes nothing anew",
    )
    summary = _summary(manifest, config)
    storage.write_json(dataset / "summary.json", summary)
    storage.write_bytes(dataset / "samples.png", _samples(dataset, manifest, config))
    files |= {name: storage.record_of(dataset / name) for name in ("summary.json", "samples.png")}
    outputs.finish(
        dataset,
        counts={key: summary[key] for key in ("n_files", "n_ok", "n_quarantined", "n_patients", "n_by_label")},
        files=files,
        dataset_digest=_dataset_digest(manifest, config.image_size),
        listing_digest=listing_digest(listing),
        timings={
            "listing_s": round(listed - begun, 2),
            "ray_start_s": round(connected - listed, 2),
            "decode_s": round(decoded - connected, 2),
            "total_s": round(time.monotonic() - begun, 2),
            "images_decoded": n_read,
            "decode_images_per_second": round(n_read / (decoded - connected), 1),
        },
    )
    print_summary(summary)
    log.info("dataset: %s", dataset)


def _forget(work: UPath, files: pa.Table) -> None:
    """Makes the shards of these rows of the listing unfinished."""
    for shard in np.unique(files["key"].to_numpy() // _SHARD_ROWS):
        storage.remove(work / "manifest" / storage.part_name(int(shard)))


def _decode_all(listing: pa.Table, dataset: UPath, *, image_size: int) -> int:
    """Decodes the shards that no earlier run finished, in parallel; returns the number of files read."""
    n_shards = -(-listing.num_rows // _SHARD_ROWS)
    finished = {path.name for path in storage.parts(outputs.work_of(dataset, "ingest") / "manifest")}
    todo = [{"shard": i} for i in range(n_shards) if storage.part_name(i) not in finished]
    if not todo:
        return 0
    if finished:
        log.info("%d of %d shards were finished before", n_shards - len(todo), n_shards)
    # Tasks take slices of one shared copy; only the shard's number travels. Each reads, decodes and writes by itself,
    # so no pixels pass through the object store.
    shared = ray.put(listing)
    ray_dataset = ray.data.from_items(todo, override_num_blocks=len(todo)).map(
        _decode_shard,
        fn_kwargs={
            "listing": [shared],
            "dataset": storage.as_url(dataset),
            "work": storage.as_url(outputs.work_of(dataset, "ingest")),
            "image_size": image_size,
        },
        num_cpus=1,
    )
    # Ray Data reserves half of the CPUs for each of its operators, and from_items is one: of two cores one stood idle
    # for a second, and between shards (0.47 of two bare OpenCV processes with it, 0.61 without).
    ray_dataset.context.op_resource_reservation_enabled = False
    n_files: int = sum(listing.slice(row["shard"] * _SHARD_ROWS, _SHARD_ROWS).num_rows for row in todo)
    n_bad = 0
    with progress("ingest", n_files) as report:
        for row in ray_dataset.iter_rows():
            n_bad += row["n_bad"]
            report(row["n"], f"{n_bad} in quarantine" if n_bad else "")
    return n_files


def _decode_shard(
    row: dict[str, Any], *, listing: list[Any], dataset: str, work: str, image_size: int
) -> dict[str, Any]:
    """One shard: its crops part, that file's record, then its manifest part."""
    index = row["shard"]
    shard = ray.get(listing[0]).slice(index * _SHARD_ROWS, _SHARD_ROWS)
    cells = read_cells(shard, image_size=image_size)
    path, name = storage.locate(dataset), storage.part_name(index)
    records: dict[str, FileRecord] = {}
    usable = cells.table.filter(pc.equal(cells.table["status"], OK))
    if usable.num_rows:
        records[f"crops/{name}"] = storage.write_table(
            path / "crops" / name,
            _crops(usable, cells.pixels, image_size),
            row_group_rows=_CROPS_ROW_GROUP,
            dictionary=["patient_id", "label"],
        )
    books = storage.locate(work)
    storage.write_json(books / "records" / f"{name}.json", dict(records))
    storage.write_table(books / "manifest" / name, cells.table)  # last: with it the shard is finished
    return {"n": shard.num_rows, "n_bad": shard.num_rows - usable.num_rows}


def _crops(usable: pa.Table, pixels: Pixels, image_size: int) -> pa.Table:
    schema = crops_table(image_size).arrow_schema()
    return usable.append_column("image", crops_column(pixels)).select(schema.names).cast(schema)


def _publish(dataset: UPath, listed: pa.ChunkedArray) -> tuple[pa.Table, dict[str, FileRecord]]:
    """Joins the shards' rows to manifest.parquet and quarantine/; returns the manifest and every file's record.

    Raises: `InvariantError` unless there is one row for each of the names `listed`.
    """
    work = outputs.work_of(dataset, "ingest")
    rows = storage.read_table(work / "manifest").sort_by([("patient_id", "ascending"), ("image_id", "ascending")])
    known = pc.unique(rows["image_id"].filter(pc.is_in(rows["image_id"], listed.combine_chunks())))
    if not rows.num_rows == len(known) == len(listed):
        raise InvariantError(
            f"{rows.num_rows:,} rows of {len(listed):,} files were found in {work}, {len(known):,} of them of these "
            f"files; {dataset} is not published: keep it and report this"
        )
    manifest = rows.select(MANIFEST.names).cast(MANIFEST.arrow_schema())
    bad = rows.filter(pc.not_equal(rows["status"], OK))
    quarantine = bad.rename_columns({"status": "reason"}).append_column("stage", pa.repeat("ingest", bad.num_rows))
    quarantine = quarantine.select(QUARANTINE.names).cast(QUARANTINE.arrow_schema())
    files: dict[str, FileRecord] = {}
    for file in storage.children(work / "records"):
        if file.name.endswith(".json"):  # and not what a killed write left
            files.update(storage.read_json(file))
    for part in storage.parts(dataset / "crops"):
        if f"crops/{part.name}" not in files:  # of a shard that was begun, killed, and then had no usable image
            storage.remove(part)
    for name, table in (("manifest.parquet", manifest), (f"quarantine/{storage.part_name(0)}", quarantine)):
        files |= outputs.write_table(dataset, name, table, stage="ingest")
    return manifest, files


def _dataset_digest(manifest: pa.Table, image_size: int) -> str:
    """First 16 hex digits of a SHA-256 over every row of the manifest and the preprocessing: the name of these exact
    data.
    """
    digest = hashlib.sha256(f"{PREPROCESSING} {image_size}".encode())
    for row in manifest.sort_by("image_id").to_pylist():
        digest.update(
            repr([row[name] for name in ("image_id", "label", "patient_id", "content_digest", "status")]).encode()
        )
    return digest.hexdigest()[:16]


def _summary(manifest: pa.Table, config: Config) -> dict[str, Any]:
    """What the article looks at first: images per class, widths and heights."""
    cells = manifest.to_pandas()
    usable = cells[cells["status"] == OK]
    measured, of = usable, "all images"
    if config.split_by:
        measured = usable[assign_splits(usable, by=config.split_by, seed=config.seed) == "train"]
        of = f"training split by {config.split_by}, seed {config.seed}"
    names = {label.value: label.name for label in Label}
    return {
        "n_files": len(cells),
        "n_ok": len(usable),
        "n_quarantined": len(cells) - len(usable),
        "n_patients": int(usable["patient_id"].nunique()),
        "n_without_patient": int(usable["patient_id"].isna().sum()),
        "n_by_label": {name: int((usable["label"] == value).sum()) for value, name in names.items()},
        "n_unlabelled": int(usable["label"].isna().sum()),
        "quarantine_reasons": cells.loc[cells["status"] != OK, "status"].value_counts().to_dict(),
        "image_size": config.image_size,
        "measured": {
            "of": of,
            "n": len(measured),
            "pixels": {side: _spread(measured[side]) for side in ("width", "height")},
        },
        "is_synthetic": has_synthetic(manifest["image_id"]),
    }


def _spread(pixels: pd.Series) -> dict[str, float] | None:
    if pixels.empty:
        return None
    return {
        "min": int(pixels.min()),
        "mean": round(float(pixels.mean()), 2),
        "median": float(pixels.median()),
        "max": int(pixels.max()),
    }


def _samples(dataset: UPath, manifest: pa.Table, config: Config) -> bytes:
    """A grid of cells, half of them of each class, chosen by the seed."""
    from malaria_ray.stages.pictures import samples_figure  # Matplotlib, which workers do not need

    parts = storage.parts(dataset / "crops")
    if not parts:
        return samples_figure(np.empty((0, config.image_size, config.image_size, 3), np.uint8), [], "no usable image")
    rng = np.random.default_rng([config.seed])
    chosen = [parts[i] for i in sorted(rng.choice(len(parts), min(4, len(parts)), replace=False))]
    crops = storage.concat(storage.read_table(part) for part in chosen)
    labels = crops["label"].to_pandas().to_numpy(dtype=float, na_value=np.nan)
    rows: list[int] = []
    for group in (labels == 0, labels == 1) if np.isfinite(labels).any() else (np.ones(len(labels), bool),):
        of_group = np.flatnonzero(group)
        n = min(_N_SAMPLES // 2, len(of_group))
        rows += sorted(rng.choice(of_group, n, replace=False).tolist())
    taken = crops.take(rows)
    names = {label.value: label.name for label in Label}
    titles = [
        f"{names.get(label, 'unlabelled')}\n{patient or 'no patient'} · {width}×{height}"
        for label, patient, width, height in zip(
            *(taken[name].to_pylist() for name in ("label", "patient_id", "width", "height")), strict=True
        )
    ]
    heading = f"{len(rows)} of {manifest.num_rows:,} images, resized to {config.image_size} × {config.image_size}"
    if has_synthetic(taken["image_id"]):
        heading += " · SYNTHETIC"
    return samples_figure(crop_pixels(taken["image"], image_size=config.image_size), titles, heading)


def print_summary(summary: dict[str, Any]) -> None:
    out = console()
    counts = RichTable("", "images", title="dataset" + (" (synthetic images)" if summary["is_synthetic"] else ""))
    for name, n in (
        *summary["n_by_label"].items(),
        ("unlabelled", summary["n_unlabelled"]),
        ("in quarantine", summary["n_quarantined"]),
        ("files", summary["n_files"]),
        ("patients", summary["n_patients"]),
    ):
        counts.add_row(name, f"{n:,}")
    out.print(counts)
    for reason, n in summary["quarantine_reasons"].items():
        out.print(f"  quarantine {reason}: {n:,}")
    measured = summary["measured"]
    sizes = RichTable("pixels", "min", "mean", "median", "max", title=f"{measured['of']} ({measured['n']:,})")
    for side, spread in measured["pixels"].items():
        if spread:
            sizes.add_row(side, *(f"{spread[key]:g}" for key in ("min", "mean", "median", "max")))
    out.print(sizes)
    if sum(n > 0 for n in summary["n_by_label"].values()) == 1 and not summary["n_unlabelled"]:
        out.print("one class only: this dataset can be screened, not trained on")
