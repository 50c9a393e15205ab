"""What runs in the workers of a screening: reading, decoding and scoring one block of a listing. No stage: no `run`.

Where there is no GPU one actor does all three, so that pixels are never copied between processes. For GPUs tasks on
CPUs read and decode (`decode_block`) and the actors only score.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.util import metrics

from malaria_ray.archives.listing import shards
from malaria_ray.archives.reading import read_cells
from malaria_ray.cells.crops import crop_pixels, crops_column
from malaria_ray.cells.images import Pixels
from malaria_ray.cells.quality import flags, quality
from malaria_ray.errors import MalariaRayError
from malaria_ray.models.engines import EngineName, Features, Scores, open_engine, read_run_file
from malaria_ray.runtime import storage
from malaria_ray.schema import OK
from malaria_ray.statistics.calibration import calibrate
from malaria_ray.statistics.novelty import Novelty

_PIECE_BYTES = 32 * 1024**2  # of pixels that an actor holds at a time, whatever the size of its block
_PIECE_ROWS = 256  # larger arrays would go back to the system after each piece: a tenth of the time to decode
_LATENCY_S = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]


@dataclass(frozen=True, kw_only=True)
class ScoringPlan:
    """What every scoring actor needs to know."""

    model_file: str
    model_sha256: str
    engine: EngineName
    image_size: int
    batch_size: int
    n_threads: int
    use_gpu: bool
    threshold: float
    """Of calibrated scores."""
    temperature: float
    novelty_file: str
    novelty_sha256: str
    model: str
    run_id: str


@dataclass(frozen=True)
class Piece:
    """Some rows of a block after decoding. `rows`: the columns of `read_cells`, key and read_s; `pixels`: uint8
    (n_ok, size, size, 3), RGB, one for each row whose status is `ok`, in the same order.
    """

    rows: pa.Table
    pixels: Pixels


def image_columns(
    raw_scores: Scores, features: Features, sides: pa.Table, pixels: Pixels, plan: ScoringPlan, novelty: Novelty
) -> dict[str, pa.Array]:
    """What is said of each usable image, by column of the predictions.

    `raw_scores`: float32 (n,), 0..1; `features`: float32 (n, k); `sides`: n rows of width and height before resizing;
    `pixels`: uint8 (n, size, size, 3), RGB. Each column has n values.
    """
    scores = calibrate(raw_scores, plan.temperature) if len(raw_scores) else raw_scores
    is_called = scores >= np.float32(plan.threshold)
    measured = zip(pixels, sides["width"].to_pylist(), sides["height"].to_pylist(), strict=True)
    found = [flags(quality(image, width=width, height=height)) for image, width, height in measured]
    return {
        "score": pa.array(scores, pa.float32()),
        "predicted_label": pa.array(is_called.astype(np.int8)),
        "raw_score": pa.array(raw_scores, pa.float32()),
        "novelty": pa.array(novelty.distance(features) / np.float32(novelty.threshold), pa.float32()),
        "quality_flags": pa.array([[str(flag) for flag in of_image] for of_image in found], pa.list_(pa.string())),
    }


class Scorer:
    """One actor. Takes blocks of a listing, or of `decode_block`; gives a row for each of their rows, whose columns are
    those of predictions and quarantine and

    key         the row of the listing
    status, detail    `ok`, or why the image is in quarantine
    read_s, score_s   seconds for this image, its share of its piece: reading and decoding, the network alone
    scored_at   when its piece was done, Unix time in seconds
    engine      what computed the network in this process
    """

    def __init__(self, plan: ScoringPlan):
        self.plan = plan
        self._fault: MalariaRayError | None = None
        try:
            model = read_run_file(storage.locate(plan.model_file), sha256=plan.model_sha256)
            self.engine = open_engine(
                plan.engine, model, n_threads=plan.n_threads, batch_size=plan.batch_size, use_gpu=plan.use_gpu
            )
            novelty = read_run_file(storage.locate(plan.novelty_file), sha256=plan.novelty_sha256)
            self.novelty = Novelty.from_bytes(novelty)
        except MalariaRayError as error:  # told by the first block: of a constructor's error Ray passes on but a text
            self._fault = error
        self._metrics = _Metrics(plan)

    def __call__(self, block: pa.Table) -> pa.Table:
        if self._fault is not None:
            raise self._fault
        is_decoded, plan = "image" in block.column_names, self.plan
        pieces = [_unpacked(block, plan)] if is_decoded else _pieces(block, plan.image_size, plan.batch_size)
        return pa.concat_tables([self._score(piece) for piece in pieces])

    def _score(self, piece: Piece) -> pa.Table:
        plan, n = self.plan, piece.rows.num_rows
        begun = time.perf_counter()
        raw_scores, features = self.engine.describe(piece.pixels)
        seconds = time.perf_counter() - begun
        is_ok = pc.equal(piece.rows["status"], OK).to_numpy()
        place = pa.array(np.cumsum(is_ok) - 1, mask=~is_ok)  # of each row among the usable ones; null for the others
        rows = piece.rows
        sides = rows.select(["width", "height"]).filter(is_ok)
        columns = image_columns(raw_scores, features, sides, piece.pixels, plan, self.novelty)
        for name, column in columns.items():
            rows = rows.append_column(name, column.take(place))
        for name, value in (
            ("model", pa.scalar(plan.model)),
            ("run_id", pa.scalar(plan.run_id)),
            ("score_s", pa.scalar(seconds / n, pa.float32())),
            ("scored_at", pa.scalar(time.time(), pa.float64())),
            ("engine", pa.scalar(self.engine.name)),
        ):
            rows = rows.append_column(name, pa.repeat(value, n))
        self._metrics.count(rows, seconds)
        return rows


def decode_block(block: pa.Table, *, image_size: int, batch_size: int) -> Iterator[pa.Table]:
    """A block of the listing piece by piece, with its pixels in a last column `image` (black where the status is not
    `ok`).
    """
    for piece in _pieces(block, image_size, batch_size):
        is_ok = pc.equal(piece.rows["status"], OK).to_numpy()
        pixels = piece.pixels
        if not is_ok.all():
            pixels = np.zeros((len(is_ok), *pixels.shape[1:]), np.uint8)
            pixels[is_ok] = piece.pixels
        yield piece.rows.append_column("image", crops_column(pixels))


def _unpacked(block: pa.Table, plan: ScoringPlan) -> Piece:
    is_ok = pc.equal(block["status"], OK).to_numpy()
    pixels = crop_pixels(block["image"], image_size=plan.image_size)
    return Piece(block.drop_columns(["image"]), pixels if is_ok.all() else pixels[is_ok])


def _pieces(block: pa.Table, image_size: int, batch_size: int) -> Iterator[Piece]:
    """The block decoded piece by piece. Behind a network the next one is read while this one is scored; on a local
    disk that would only make two threads fight over one core.
    """
    n_rows = min(_PIECE_ROWS, _PIECE_BYTES // (image_size**2 * 3))
    n_rows = max(1, n_rows // batch_size) * batch_size  # whole batches: a padded one costs as much
    listings = list(shards(block, n_rows))
    if storage.is_local(storage.locate(block["container"][0].as_py())):
        for listing in listings:
            yield _read(listing, image_size)
        return
    with ThreadPoolExecutor(1) as ahead:
        reading = ahead.submit(_read, listings[0], image_size)
        for listing in listings[1:]:
            piece = reading.result()
            reading = ahead.submit(_read, listing, image_size)
            yield piece
        yield reading.result()


def _read(listing: pa.Table, image_size: int) -> Piece:
    begun = time.perf_counter()
    cells = read_cells(listing, image_size=image_size)
    seconds = pa.scalar((time.perf_counter() - begun) / listing.num_rows, pa.float32())
    rows = cells.table.append_column("key", listing["key"])
    return Piece(rows.append_column("read_s", pa.repeat(seconds, listing.num_rows)), cells.pixels)


class _Metrics:
    """What operators watch in Prometheus: ray_malaria_… (cluster/monitoring/grafana-dashboard.json). An image that is
    scored again after a kill counts again.
    """

    def __init__(self, plan: ScoringPlan):
        tags = {"model": plan.model}

        def counter(name: str, meaning: str, *keys: str) -> metrics.Counter:
            made = metrics.Counter(name, meaning, tag_keys=("model", *keys))
            made.set_default_tags(tags)
            return made

        self._batch_size = plan.batch_size
        self._scored = counter("malaria_images_scored", "images that were given a score")
        self._positive = counter("malaria_images_called_parasitized", "of them, called parasitized")
        self._quarantined = counter("malaria_images_quarantined", "images that cannot be used", "reason")
        self._latency = metrics.Histogram(
            "malaria_batch_seconds", "seconds that the network takes for a batch", _LATENCY_S, tag_keys=("model",)
        )
        self._latency.set_default_tags(tags)

    def count(self, rows: pa.Table, seconds: float) -> None:
        statuses: Counter[Any] = Counter(rows["status"].to_pylist())
        n_scored = statuses.pop(OK, 0)
        for reason, n in statuses.items():
            self._quarantined.inc(n, {"reason": reason})
        if n_scored:  # Ray refuses to add nothing
            self._scored.inc(n_scored)
            n_batches = -(-n_scored // self._batch_size)
            for _ in range(n_batches):
                self._latency.observe(seconds / n_batches)
        if n_positive := pc.sum(rows["predicted_label"]).as_py():
            self._positive.inc(n_positive)
