"""pack: millions of small files become few Parquet files of their encoded bytes, which later runs read one after the
other.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from rich.table import Table as RichTable
from tyro.conf import Positional
from upath import UPath

from malaria_ray.archives import containers, open_archive
from malaria_ray.archives.datasets import DatasetArchive
from malaria_ray.archives.listing import check_same_listing, list_archive, listing_digest
from malaria_ray.archives.patients import patient_rule
from malaria_ray.archives.reading import UNKNOWN_BYTES, read_files
from malaria_ray.archives.replaced import check_unchanged, forget_replaced
from malaria_ray.cells.images import content_digest
from malaria_ray.errors import ArchiveError, ConfigError
from malaria_ray.runtime import outputs, storage
from malaria_ray.runtime.session import ray_session
from malaria_ray.runtime.terminal import console, progress
from malaria_ray.schema import LISTING, OK, PACKED, Reason
from malaria_ray.stages.refusals import check_few_refused, check_fraction

log = logging.getLogger("malaria_ray")

_ROW_GROUP = 256  # rows: some 3 MB of cell images, what is read at a time


@dataclass(frozen=True, kw_only=True)
class Config:
    """Packs the files of an archive, as they are, into Parquet files that 'ingest' and 'screen' read as an archive."""

    archive: Positional[str]
    """Any archive that 'ingest' reads."""
    packed: Positional[str]
    """Directory to write, made if missing."""
    part_mb: int = 128
    """Size of one Parquet file in megabytes; 64 to 256 read well from disks and object stores."""
    patients: tuple[str, ...] = ()
    """Patient mapping files, as for 'ingest'."""
    patient_pattern: str | None = None
    """Rule for patients in the paths, as for 'ingest'."""
    max_bad_fraction: float = 0.5
    """Fail when more than this share of the files cannot be read."""
    overwrite: bool = False
    """Delete what was packed first if it is there."""

    def __post_init__(self) -> None:
        if not 1 <= self.part_mb <= 1024:
            raise ConfigError(f"--part-mb {self.part_mb}: allowed are 1 to 1024 megabytes")
        check_fraction(self.max_bad_fraction)


@outputs.one_writer()
def run(config: Config) -> None:
    """Packs; does nothing where it is finished; goes on where an earlier run of the same config stopped, and tries the
    files again that could not be read then.
    """
    begun = time.monotonic()
    packed = storage.locate(config.packed)
    rule = patient_rule(config.patients, config.patient_pattern)  # before an archive that may be a download
    archive = open_archive(config.archive)
    if isinstance(archive, DatasetArchive):
        raise ArchiveError(f"{config.archive} is a dataset already; pack takes archives of image files")
    identity = {**archive.identity(), **rule.identity, "part_mb": config.part_mb}
    claim = outputs.claim(
        packed,
        stage="pack",
        config=config,
        identity=identity,
        overwrite=config.overwrite,
        inputs=(archive.url, *config.patients),
    )
    if claim is None:
        log.info("%s is finished; nothing to do (--overwrite packs anew, with images added since)", packed)
        _print_summary(storage.read_json(packed / outputs.SUCCESS)["counts"])
        return
    listing = list_archive(archive, patients=rule.of_file, pattern=rule.pattern)
    claim.begin()
    work = outputs.work_of(packed, "pack")
    check_same_listing(work, listing)
    bounds = part_bounds(listing, config.part_mb * 10**6)
    forget_replaced(
        work,
        archive,
        listing,
        done=lambda: _done(packed, work, len(bounds)),
        forget=lambda files: _forget(work, bounds, files),
    )
    log.info("%s: %s files into %d parts", archive.url, f"{listing.num_rows:,}", len(bounds))
    with ray_session():
        connected = time.monotonic()
        n_packed = _pack_all(listing, bounds, packed)
        check_unchanged(work, archive, listing)
        done = time.monotonic()

    outputs.check_held(packed)
    records = [storage.read_json(_record(work, part)) for part in range(len(bounds))]
    counts = _counts(records)
    check_few_refused(
        counts["reasons"],
        counts["n_files"],
        allowed=config.max_bad_fraction,
        cannot="be read",
        what_to_do="correct the archive and run again, which tries those anew",
    )
    files = {f"images/{storage.part_name(part)}": record["file"] for part, record in enumerate(records)}
    places = packed_listing(listing, bounds)
    files["listing.parquet"] = storage.write_table(packed / "listing.parquet", places)
    outputs.finish(
        packed,
        counts=counts,
        files=files,
        packed_digest=_digest(files),
        listing_digest=listing_digest(listing),
        timings={
            "total_s": round(time.monotonic() - begun, 2),
            "packing_s": round(done - connected, 2),
            "files_packed": n_packed,
            "files_per_second": round(n_packed / max(done - connected, 1e-9), 1),
        },
    )
    _print_summary(counts)
    log.info("packed: %s", packed)


def part_bounds(listing: pa.Table, part_bytes: int) -> list[tuple[int, int]]:
    """(first row, rows) of each part: consecutive files of about `part_bytes` together, at least one."""
    sizes = pc.fill_null(pc.coalesce(listing["n_bytes"], listing["packed_bytes"]), UNKNOWN_BYTES).to_numpy()
    part = (np.cumsum(sizes) - sizes) // part_bytes
    first = np.flatnonzero(np.diff(part, prepend=-1))
    return [(int(start), int(end - start)) for start, end in itertools.pairwise([*first, listing.num_rows])]


def packed_listing(listing: pa.Table, bounds: list[tuple[int, int]]) -> pa.Table:
    """The listing of what is packed: the same files at their new places, which are named from the directory."""
    parts = np.repeat(np.arange(len(bounds)), [n for _, n in bounds])
    rows = np.arange(listing.num_rows) - np.repeat([start for start, _ in bounds], [n for _, n in bounds])
    names = pa.array([f"images/{storage.part_name(part)}" for part in range(len(bounds))])
    n = listing.num_rows
    places = {
        **{name: listing[name] for name in ("key", "image_id", "label", "patient_id", "n_bytes")},
        "container": names.take(pa.array(parts)),
        "method": pa.repeat("parquet", n),
        "offset": pa.array(rows, pa.int64()),
        "span": pa.nulls(n, pa.int64()),
        "packed_bytes": pc.coalesce(listing["n_bytes"], listing["packed_bytes"]),
        "crc32": pa.nulls(n, pa.int64()),
    }
    return pa.table(places).select(LISTING.names).cast(LISTING.arrow_schema())


def _record(work: UPath, part: int) -> UPath:
    return work / "records" / f"{storage.part_name(part)}.json"


def _done(packed: UPath, work: UPath, n_parts: int) -> Iterator[pa.Table]:
    """image_id and content_digest of each finished part."""
    for part in range(n_parts):
        if _record(work, part).exists():
            with containers.opened(packed / "images" / storage.part_name(part), is_read_in_order=False) as file:
                yield pq.read_table(file, columns=["image_id", "content_digest"], use_threads=False)


def _forget(work: UPath, bounds: list[tuple[int, int]], files: pa.Table) -> None:
    """Makes the parts of these rows of the listing unfinished."""
    starts = [start for start, _ in bounds]
    for part in np.unique(np.searchsorted(starts, files["key"].to_numpy(), side="right") - 1):
        storage.remove(_record(work, int(part)))


def _pack_all(listing: pa.Table, bounds: list[tuple[int, int]], packed: UPath) -> int:
    """Packs the parts that no earlier run finished, in parallel; returns the number of files read."""
    todo, work = [], outputs.work_of(packed, "pack")
    for part, (start, n) in enumerate(bounds):
        record = _record(work, part)
        if not record.exists() or storage.read_json(record)["reasons"].get(Reason.UNREADABLE):
            todo.append({"part": part, "start": start, "n": n})
    if not todo:
        return 0
    if len(todo) < len(bounds):
        log.info("%d of %d parts were finished before", len(bounds) - len(todo), len(bounds))
    shared = ray.put(listing)
    dataset = ray.data.from_items(todo, override_num_blocks=len(todo)).map(
        _pack_part,
        fn_kwargs={"listing": [shared], "packed": storage.as_url(packed), "work": storage.as_url(work)},
        num_cpus=1,
    )
    n_bad = 0
    with progress("pack", sum(row["n"] for row in todo), "files") as report:
        for row in dataset.iter_rows():
            n_bad += row["n_bad"]
            report(row["n"], f"{n_bad} unreadable" if n_bad else "")
    return sum(row["n"] for row in todo)


def _pack_part(row: dict[str, Any], *, listing: list[Any], packed: str, work: str) -> dict[str, Any]:
    """One part, then its record, whose presence says that the part is whole."""
    files = ray.get(listing[0]).slice(row["start"], row["n"])
    name = storage.part_name(row["part"])
    data, reasons, n_bytes = packed_file(files)
    storage.write_bytes(storage.locate(packed) / "images" / name, data)
    record = {"bytes": len(data), "rows": files.num_rows, "sha256": hashlib.sha256(data).hexdigest()}
    content = {"file": record, "reasons": reasons, "n_bytes": n_bytes}
    storage.write_json(_record(storage.locate(work), row["part"]), content)
    return {"n": files.num_rows, "n_bad": sum(reasons.values())}


def packed_file(listing: pa.Table) -> tuple[memoryview, dict[str, int], int]:
    """(Parquet file of a part's files, how many could not be read by reason, bytes of the others). One row per file."""
    reasons: Counter[str] = Counter()
    n_bytes = 0
    buffer = io.BytesIO()
    schema = PACKED.arrow_schema()
    # Images are packed already, and their minima and maxima would be whole images in the footer.
    others = [name for name in schema.names if name != "image"]
    with pq.ParquetWriter(
        buffer,
        schema,
        compression={name: "zstd" if name in others else "none" for name in schema.names},
        use_dictionary=["label", "patient_id", "status", "detail"],
        write_statistics=others,
    ) as writer:
        for table in _row_groups(listing):
            reasons.update(status for status in table["status"].to_pylist() if status != OK)
            n_bytes += pc.sum(pc.binary_length(table["image"])).as_py() or 0
            writer.write_table(table.cast(schema))
    return buffer.getbuffer(), dict(reasons), n_bytes


def _row_groups(listing: pa.Table) -> Iterator[pa.Table]:
    contents = read_files(listing)
    for start in range(0, listing.num_rows, _ROW_GROUP):
        rows = listing.slice(start, _ROW_GROUP)
        read = list(itertools.islice(contents, rows.num_rows))
        whole = [data if isinstance(data, bytes) else None for data in read]
        status = [OK if isinstance(data, bytes) else data.reason.value for data in read]
        detail = [None if isinstance(data, bytes) else data.detail for data in read]
        sizes = pa.array([None if data is None else len(data) for data in whole], pa.int64())
        yield pa.table(
            {
                "image_id": rows["image_id"],
                "label": rows["label"],
                "patient_id": rows["patient_id"],
                "n_bytes": pc.coalesce(sizes, rows["n_bytes"]),
                "content_digest": pa.array([data and content_digest(data) for data in whole], pa.string()),
                "status": pa.array(status, pa.string()),
                "detail": pa.array(detail, pa.string()),
                "image": pa.array(whole, pa.binary()),
            }
        )


def _counts(records: list[dict[str, Any]]) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    for record in records:
        reasons.update(record["reasons"])
    return {
        "n_files": sum(record["file"]["rows"] for record in records),
        "n_parts": len(records),
        "n_bytes": sum(record["n_bytes"] for record in records),
        "reasons": dict(reasons.most_common()),
    }


def _digest(files: dict[str, Any]) -> str:
    text = "".join(f"{name} {record['sha256']}\n" for name, record in sorted(files.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _print_summary(counts: dict[str, Any]) -> None:
    table = RichTable("", "", title="packed")
    table.add_row("files", f"{counts['n_files']:,}")
    table.add_row("parts", f"{counts['n_parts']:,}")
    table.add_row("megabytes", f"{counts['n_bytes'] / 1e6:,.1f}")
    for reason, n in counts["reasons"].items():
        table.add_row(f"without bytes: {reason}", f"{n:,}")
    console().print(table)
