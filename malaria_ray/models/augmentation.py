"""Random changes of training images that leave their label as it is; Keras layers, so they run on the device that
trains.
"""

from __future__ import annotations

import keras

_DEGREES = 25 / 360


def build_augmentation(image_size: int, *, seed: int) -> keras.Model:
    """uint8 (n, image_size, image_size, 3) → the same, changed.

    The article's changes: rotation up to 25°, zoom, shifts and shear of 0.05, horizontal flip, nearest fill. A cell
    has no
    upper side, so vertical flips are added; stains and lamps differ, so brightness, contrast and saturation are too.
    """
    changes = [
        keras.layers.RandomFlip("horizontal_and_vertical", seed=seed),
        keras.layers.RandomRotation(_DEGREES, fill_mode="nearest", seed=seed + 1),
        keras.layers.RandomTranslation(0.05, 0.05, fill_mode="nearest", seed=seed + 2),
        keras.layers.RandomZoom(0.05, fill_mode="nearest", seed=seed + 3),
        keras.layers.RandomShear(0.05, 0.05, fill_mode="nearest", seed=seed + 4),
        keras.layers.RandomBrightness(0.1, value_range=(0, 255), seed=seed + 5),
        keras.layers.RandomContrast(0.1, value_range=(0, 255), seed=seed + 6),
        keras.layers.RandomSaturation((0.4, 0.6), value_range=(0, 255), seed=seed + 7),
    ]
    inputs = keras.Input((image_size, image_size, 3), dtype="uint8")
    images = keras.layers.Rescaling(1.0)(inputs)
    for change in changes:
        images = change(images, training=True)
    return keras.Model(inputs, keras.ops.cast(keras.ops.clip(keras.ops.round(images), 0, 255), "uint8"))
