"""What the three models share: the image input and the article's dense head."""

from __future__ import annotations

from typing import Any

import keras


def image_input(image_size: int) -> Any:
    """Input of raw pixels: uint8 (n, image_size, image_size, 3), RGB, 0..255. Scaling is a layer behind it."""
    return keras.Input((image_size, image_size, 3), dtype="uint8", name="image")


def dense_head(features: Any) -> Any:
    """Twice dense 512 with ReLU and dropout 0.3, then one sigmoid: float32 (n, 1), P(parasitized)."""
    for _ in range(2):
        features = keras.layers.Dense(512, activation="relu")(features)
        features = keras.layers.Dropout(0.3)(features)
    return keras.layers.Dense(1, activation="sigmoid", dtype="float32", name="score")(features)
