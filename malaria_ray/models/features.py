"""What the frozen backbone says of each image, computed once by a Ray Data job and shared by every later training."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy
from upath import UPath

from malaria_ray.cells.crops import crop_pixels
from malaria_ray.cells.images import Pixels
from malaria_ray.models.building import build_backbone
from malaria_ray.models.engines import open_engine
from malaria_ray.models.export import to_onnx
from malaria_ray.runtime import storage
from malaria_ray.runtime.terminal import progress

FLIPS = ("", "flipped_x", "flipped_y", "flipped_xy")
"""The image as it is, and the other three with the folders that their features lie in."""

_BATCH_SIZE = 16  # at VGG-19's cost per image a larger batch gains nothing on CPUs
_ACTOR_CPUS = 0.9


@dataclass(frozen=True, kw_only=True)
class FeaturePlan:
    """What every feature actor needs to know."""

    backbone: Any
    """Object reference of the backbone as ONNX bytes."""
    image_size: int


def feature_parts(
    crops: list[tuple[UPath, str]],
    folder: UPath,
    *,
    weights: bytes,
    image_size: int,
    n_actors: int,
    flips: tuple[str, ...],
) -> list[UPath]:
    """The feature parts of a dataset in `folder`, one for each crops part, in its order, flip by flip; makes those that
    are missing. `crops`: the parts with their SHA-256.

    A part has the columns image_id and features, the bytes of k float16 (k is 4,608 at 125 × 125).
    """
    parts = [(part, digest, folder / flip / part.name, flip) for flip in flips for part, digest in crops]
    todo = [
        {"crops": storage.as_url(part), "sha256": digest, "features": storage.as_url(target), "flip": flip}
        for part, digest, target, flip in parts
        if not target.exists()
    ]
    if todo:
        # Got before the actors take the CPUs that making it needs, and its error is raised here and not in each actor.
        backbone = ray.get(ray.remote(_backbone_as_onnx).remote(weights, image_size))
        plan = FeaturePlan(backbone=ray.put(backbone), image_size=image_size)
        rows = ray.data.from_items(todo, override_num_blocks=len(todo)).map(
            _FeatureActor,
            fn_constructor_args=([plan],),
            compute=ActorPoolStrategy(size=min(n_actors, len(todo))),
            num_cpus=_ACTOR_CPUS,
        )
        n_images = sum(storage.n_rows(storage.locate(one["crops"])) for one in todo)
        with progress("features", n_images) as report:
            for row in rows.iter_rows():
                report(row["n"])
    return [target for _, _, target, _ in parts]


def read_features(url: str) -> npt.NDArray[np.float16]:
    """One part as float16 (n, k)."""
    column = storage.read_table(storage.locate(url), columns=["features"])["features"].combine_chunks()
    n = len(column)
    return np.frombuffer(column.buffers()[1], np.float16).reshape(-1, column.type.byte_width // 2)[column.offset :][:n]


def flipped(pixels: Pixels, flip: str) -> Pixels:
    """Images (n, size, size, 3) mirrored as one of `FLIPS` says."""
    y_step, x_step = (-1 if axis in flip else 1 for axis in "yx")
    return np.ascontiguousarray(pixels[:, ::y_step, ::x_step])


def _backbone_as_onnx(weights: bytes, image_size: int) -> bytes:
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    backbone = build_backbone(image_size=image_size, weights=weights)
    backbone.predict_on_batch(np.zeros((1, image_size, image_size, 3), np.uint8))
    return to_onnx(backbone)


class _FeatureActor:
    def __init__(self, plan: list[FeaturePlan]):
        self.plan = plan[0]
        self.engine = open_engine("ncnn", ray.get(self.plan.backbone), n_threads=1, batch_size=_BATCH_SIZE)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        crops = storage.read_table(storage.locate(row["crops"]), ["image_id", "image"], sha256=row["sha256"])
        pixels = flipped(crop_pixels(crops["image"], image_size=self.plan.image_size), row["flip"])
        features = self.engine.outputs(pixels)[0].astype(np.float16)
        type_ = pa.binary(features.shape[1] * 2)
        column = pa.FixedSizeBinaryArray.from_buffers(type_, len(features), [None, pa.py_buffer(features.tobytes())])
        table = pa.table({"image_id": crops["image_id"], "features": column})
        storage.write_table(storage.locate(row["features"]), table, dictionary=False)
        return {"n": len(features)}
