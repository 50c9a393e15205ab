"""What a run's Keras model looked at in given images of results: read from their archive, computed in a Ray task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from upath import UPath

from malaria_ray.archives.reading import read_again
from malaria_ray.cells.heat import overlay
from malaria_ray.cells.images import Pixels
from malaria_ray.errors import ArchiveError, ConfigError, NotCompleteError
from malaria_ray.models.engines import read_run_file
from malaria_ray.models.gradcam import Heat, grad_cam
from malaria_ray.runtime import outputs, storage
from malaria_ray.runtime.session import ray_session


@dataclass(frozen=True)
class Explained:
    """`cells`: image_id, score, predicted_label, one row an image; `pixels`: uint8 (n, size, size, 3), RGB; `heat`:
    float32 (n, size, size), 0..1, for the class that was called.
    """

    cells: pa.Table
    pixels: Pixels
    heat: Heat


def explain(results: UPath, image_ids: Sequence[str], *, model: str | None = None) -> Explained:
    """Grad-CAM of images that `results` has scored. `model`: where the run is now; by default where it was.

    Raises: `ConfigError` for ids without a score or another run, `ModelError`, `ArchiveError`, `NotCompleteError`.
    """
    success = outputs.check_complete(results, "screen")
    described = outputs.read_config(results, "screen")
    run = storage.locate(model or described["config"]["model"])
    if not run.exists():
        raise NotCompleteError(f"{run} is not there, where the run was; give by --model where it is now")
    trained = outputs.check_complete(run, "train")
    if trained["run_id"] != described["identity"]["run_id"]:
        raise ConfigError(
            f"{run} is {trained['run_id']}, {results} was scored by {described['identity']['run_id']}; "
            "give that run by --model"
        )
    keras_model = read_run_file(run / "model.keras", sha256=trained["files"]["model.keras"]["sha256"])
    columns = ["image_id", "score", "predicted_label", "content_digest"]
    scored = outputs.read_folder(results, success, "predictions", columns)
    cells = scored.filter(pc.is_in(scored["image_id"], value_set=pa.array(image_ids, pa.string())))
    if unknown := sorted(set(image_ids) - set(cells["image_id"].to_pylist())):
        some = ", ".join(repr(name) for name in scored["image_id"][:3].to_pylist())
        raise ConfigError(
            f"{results} has no score of {unknown[0]!r} ({len(unknown)} unknown); its ids look like {some}"
        )
    listing = outputs.read_written(results, success, "listing.parquet")
    listing = listing.filter(pc.is_in(listing["image_id"], value_set=cells["image_id"].combine_chunks()))
    image_size = int(outputs.read_config(run, "train")["identity"]["image_size"])
    with ray_session():
        task = ray.remote(num_cpus=1)(_explained)
        explained: Explained = ray.get(task.remote(cells, listing, keras_model, image_size))
    return explained


def overlays_for(results: UPath, image_ids: Sequence[str], *, model: str | None = None) -> dict[str, Pixels]:
    """image id → the crop under its heat, uint8 (size, size, 3), RGB. Raises: as `explain`."""
    found = explain(results, image_ids, model=model)
    names = found.cells["image_id"].to_pylist()
    return {name: overlay(*both) for name, *both in zip(names, found.pixels, found.heat, strict=True)}


def _explained(cells: pa.Table, listing: pa.Table, keras_model: bytes, image_size: int) -> Explained:
    names = cells["image_id"].to_pylist()
    digests = dict(zip(names, cells["content_digest"].to_pylist(), strict=True))
    crops, missing = read_again(listing, digests, image_size=image_size)
    for name, why in missing.items():
        raise ArchiveError(f"{name!r}: {why}; put the archive back as it was, or screen it again")
    pixels = np.stack([crops[name] for name in names])
    heat = grad_cam(keras_model, pixels, called=cells["predicted_label"].to_numpy())
    return Explained(cells, pixels, heat)
