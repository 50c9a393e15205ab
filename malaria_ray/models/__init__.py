"""Keras builders, the training loop of a worker, export, and the engines that score a batch.

Keras and TensorFlow are imported only below here, and inside the process that trains or scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ModelName = Literal["cnn", "vgg19-frozen", "vgg19-finetuned"]
Precision = Literal["float32", "bf16"]
DTYPE_POLICY: dict[Precision, str] = {"float32": "float32", "bf16": "mixed_bfloat16"}
"""Keras' names; with the second the layers compute in bfloat16, variables, score and loss stay float32."""

MIN_VGG19_SIZE = 32
"""Side of the smallest image, in pixels, of which VGG-19's five halvings leave anything."""


@dataclass(frozen=True)
class Recipe:
    """How the article trains a model."""

    optimizer: Literal["Adam", "RMSprop"]
    learning_rate: float
    needs_weights: bool = False
    is_augmented: bool = False


RECIPES: dict[ModelName, Recipe] = {
    "cnn": Recipe("Adam", 1e-3),
    "vgg19-frozen": Recipe("RMSprop", 1e-4, needs_weights=True),
    "vgg19-finetuned": Recipe("RMSprop", 1e-5, needs_weights=True, is_augmented=True),
}
