"""Pictures for the report: which cells to show, and their pixels out of the source archive, if it is still there."""

from __future__ import annotations

import base64
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import duckdb
import numpy as np
import pyarrow as pa
from upath import UPath

from malaria_ray.archives.reading import read_again
from malaria_ray.cells.images import Pixels
from malaria_ray.errors import MalariaRayError
from malaria_ray.schema import QUALITY_MEANING, REVIEW_MEANING, Label
from malaria_ray.stages.explanations import overlays_for

_JPEG_QUALITY = 85  # about 3 kB for a crop of 125 × 125


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Some cells of one kind. `n`: how many there are in all; `cells`: those shown, worst first."""

    key: str
    title: str
    meaning: str
    n: int
    cells: list[dict[str, Any]]


_KINDS = (
    ("false-positives", "False positives", "labelled uninfected, called parasitized; the surest first",
     "outcome = 'false positive'", "score DESC"),
    ("false-negatives", "False negatives", "labelled parasitized, called uninfected; the surest first",
     "outcome = 'false negative'", "score ASC"),
    ("parasitized", "Surest parasitized", "called parasitized; the highest scores first",
     "label IS NULL AND predicted_label = 1", "score DESC"),
    ("least-certain", "Least certain", "scores nearest the threshold, whatever the label",
     "true", "abs(score - threshold) ASC"),
)  # fmt: skip


def find_galleries(connection: duckdb.DuckDBPyConnection, *, split: str | None, n_each: int) -> list[Gallery]:
    """The cells of each gallery that has any, of one split or all, without pictures. Reads the views `cells` and
    `listing`.
    """
    of_split = "true" if split is None else "split = $split"
    given = {} if split is None else {"split": split}
    galleries = []
    for key, title, meaning, condition, order in _KINDS:
        where = f"FROM cells WHERE {of_split} AND {condition}"
        ((n,),) = connection.execute(f"SELECT count(*) {where}", given).fetchall()
        found = connection.sql(
            "SELECT image_id, patient_id, label, score, predicted_label, width, height, content_digest, split "
            f"{where} ORDER BY {order}, image_id LIMIT {n_each}",
            params=given,
        )
        if n:
            cells = found.to_arrow_table().to_pylist()
            galleries.append(Gallery(key=key, title=title, meaning=meaning, n=n, cells=cells))
    return galleries


_OF_REVIEW = (
    ("review", "To look at first", "the head of the review queue, of all splits", "rank IS NOT NULL", "rank"),
    ("flagged", "Flagged", "unusual images of all splits, in the order of the queue", "len(review.quality_flags) > 0",
     "rank NULLS LAST"),
)  # fmt: skip


def find_review_galleries(connection: duckdb.DuckDBPyConnection, *, n_each: int) -> list[Gallery]:
    """The head of the review queue and the flagged images, of all splits, with the reasons. Reads `cells`, `review`."""
    meanings = {code.value: meaning for code, meaning in (REVIEW_MEANING | QUALITY_MEANING).items()}
    galleries = []
    for key, title, meaning, condition, order in _OF_REVIEW:
        ((n,),) = connection.execute(f"SELECT count(*) FROM review WHERE {condition}").fetchall()
        if not n:
            continue
        rows = connection.sql(
            "SELECT cells.image_id, cells.patient_id, cells.label, cells.score, cells.predicted_label, cells.width, "
            "cells.height, cells.content_digest, cells.split, reasons, review.quality_flags, rank "
            f"FROM (FROM review WHERE {condition} ORDER BY {order}, image_id LIMIT {n_each}) AS review "
            f"JOIN cells USING (image_id, results) ORDER BY {order}, image_id"
        ).to_arrow_table()
        cells = []
        for cell in rows.to_pylist():
            codes = [*(cell["reasons"] or ()), *(cell["quality_flags"] or ())]
            facts = [(code.replace("_", " "), meanings.get(code, "")) for code in codes]
            words = (cell["quality_flags"] or [None])[0] if key == "flagged" else None
            cells.append(cell | {"facts": facts} | ({"words": words.replace("_", " ")} if words else {}))
        galleries.append(Gallery(key=key, title=title, meaning=meaning, n=n, cells=cells))
    return galleries


def pictures(
    connection: duckdb.DuckDBPyConnection, galleries: Sequence[Gallery], *, image_size: int
) -> tuple[dict[str, str], dict[str, str]]:
    """(image id → JPEG as a data URL, image id → why there is none) for every cell of the galleries."""
    digests = {cell["image_id"]: cell["content_digest"] for gallery in galleries for cell in gallery.cells}
    chosen = pa.table({"image_id": pa.array(digests, pa.string())})
    listing = connection.from_arrow(chosen).join(connection.view("listing"), "image_id").to_arrow_table()
    crops, missing = read_again(listing, digests, image_size=image_size)
    return {name: _data_url(crop) for name, crop in crops.items()}, missing


def heats(results: UPath, image_ids: Collection[str]) -> tuple[dict[str, str], str | None]:
    """(image id → the crop under its Grad-CAM heat as a data URL, why there are none). The run that scored the images
    computes them: it may be gone, or hold other weights since.
    """
    if not image_ids:
        return {}, None
    try:
        overlays = overlays_for(results, sorted(image_ids))
    except MalariaRayError as error:
        return {}, str(error)
    return {name: _data_url(image) for name, image in overlays.items()}, None


def _data_url(image: Pixels) -> str:
    """uint8 (size, size, 3), RGB, as the data URL of a JPEG."""
    data = cv2.imencode(".jpg", np.ascontiguousarray(image[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1]
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def label_name(label: int | None) -> str:
    return "no label" if label is None else Label(label).name
