"""explain: what the model looked at in given images, as arrays and overlays (Grad-CAM)."""

from __future__ import annotations

import hashlib
import io
import logging
import textwrap
from dataclasses import dataclass
from urllib.parse import quote

import cv2
import numpy as np
from tyro.conf import Positional

from malaria_ray.cells.heat import overlay
from malaria_ray.errors import ConfigError, DirectoryError
from malaria_ray.runtime import storage
from malaria_ray.schema import Label
from malaria_ray.stages.explanations import explain
from malaria_ray.stages.pictures import samples_figure

log = logging.getLogger(__name__)

_ARRAYS = "heatmaps.npz"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Writes heatmaps.npz (image_id, heat), one PNG an image and contact_sheet.png: where the model looked."""

    results: Positional[str]
    """Directory made by 'malaria-ray screen'."""
    image_ids: tuple[str, ...]
    """Images to explain, as the predictions name them."""
    model: str | None = None
    """The run that scored them, if it is no longer where it was."""
    out: str | None = None
    """Directory to write to; by default RESULTS/explained."""

    def __post_init__(self) -> None:
        if not self.image_ids:
            raise ConfigError("--image-ids is empty; give at least one image id of the predictions")


def run(config: Config) -> None:
    """Explains the images and writes the files, in place of those of an earlier call.

    Raises: `DirectoryError` where something else lies in --out; as `explanations.explain`.
    """
    results = storage.locate(config.results)
    out = storage.locate(config.out) if config.out else results / "explained"
    if storage.children(out) and not (out / _ARRAYS).exists():
        raise DirectoryError(f"{out} is not empty and was not made by 'malaria-ray explain'; choose another directory")
    found = explain(results, config.image_ids, model=config.model)
    cells = found.cells.to_pylist()
    overlays = [overlay(crop, heat) for crop, heat in zip(found.pixels, found.heat, strict=True)]
    arrays = io.BytesIO()
    np.savez_compressed(arrays, image_id=np.array([cell["image_id"] for cell in cells]), heat=found.heat)
    storage.write_bytes(out / _ARRAYS, arrays.getvalue())
    storage.remove(out / "overlays")
    for cell, image in zip(cells, overlays, strict=True):
        png = cv2.imencode(".png", np.ascontiguousarray(image[:, :, ::-1]))[1].tobytes()
        storage.write_bytes(out / "overlays" / file_name(cell["image_id"]), png)
    pairs = [picture for pair in zip(found.pixels, overlays, strict=True) for picture in pair]
    titles = []
    for cell in cells:
        name = cell["image_id"].rpartition("/")[2]
        titles += [textwrap.fill(name, 26), f"{Label(cell['predicted_label']).name} {cell['score']:.3f}"]
    sheet = samples_figure(np.stack(pairs), titles, "Grad-CAM of the class that was called; red is hottest")
    storage.write_bytes(out / "contact_sheet.png", sheet)
    log.info("%s images explained: %s", len(cells), out)


def file_name(image_id: str) -> str:
    """A file name of its own for each image id, without separators; long ones are cut and get a digest."""
    safe = quote(image_id, safe="")
    return f"{safe if len(safe) <= 200 else safe[:180] + hashlib.sha256(image_id.encode()).hexdigest()[:16]}.png"
