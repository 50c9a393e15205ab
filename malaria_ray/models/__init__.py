"""Keras builders, the training loop of a worker, export, and the engines that score a batch.

Keras and TensorFlow are imported only below here, and inside the process that trains or scores.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import keras

ModelName = Literal["cnn"]

_BUILDERS = {"cnn": "malaria_ray.models.cnn"}


def build_model(name: ModelName, image_size: int) -> keras.Model:
    """A new model: uint8 images (n, image_size, image_size, 3) in, P(parasitized) float32 (n, 1) out."""
    model: keras.Model = importlib.import_module(_BUILDERS[name]).build(image_size)
    return model
