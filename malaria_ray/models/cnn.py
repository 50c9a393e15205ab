"""The article's first model: three convolutions, two dense layers, trained from scratch."""

from __future__ import annotations

import keras

from malaria_ray.models.head import dense_head, image_input


def build(image_size: int) -> keras.Model:
    """Conv 3×3 with 32, 64 and 128 filters, each max-pooled, then the dense head. 15,102,529 parameters at 125 × 125.

    Image in, score out: input uint8 (n, image_size, image_size, 3), RGB; output float32 (n, 1), P(parasitized).
    Source: D. Sarkar, "Detecting Malaria with Deep Learning", os_malaria_detection.
    """
    inputs = image_input(image_size)
    features = keras.layers.Rescaling(1 / 255, name="scale")(inputs)
    for filters in (32, 64, 128):
        features = keras.layers.Conv2D(filters, 3, padding="same", activation="relu")(features)
        features = keras.layers.MaxPooling2D(2)(features)
    return keras.Model(inputs, dense_head(keras.layers.Flatten()(features)), name="cnn")
