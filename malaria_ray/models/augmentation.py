"""Random changes of training images that leave their label as it is, inside the training step and so on its device.

One affine transform and one 3 × 3 matrix of colours an image: a single resampling, whatever is changed. What is changed
by how much comes from `draws`, numbers with the address [seed, epoch, example]: the same for any number of workers, and
again after a resumption.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

_ZOOM = _SHIFT = _SHEAR = 0.05  # the article's
_BRIGHTNESS = _CONTRAST = 0.1
_STAIN = 0.05  # each colour by itself
_SATURATION = 0.2
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601
N_DRAWS = 13


def augmentation_draws(seed: int, epoch: int, n: int) -> npt.NDArray[np.float32]:
    """Numbers in 0..1 for each of `n` training examples: float32 (n, N_DRAWS)."""
    return np.random.default_rng([seed, epoch, 1]).random((n, N_DRAWS), np.float32)


def augment(images: Any, draws: Any) -> Any:
    """uint8 (n, size, size, 3) and float32 (n, N_DRAWS) in 0..1 → uint8 (n, size, size, 3).

    The article's changes are zoom, shifts and shear of 0.05, horizontal flip, nearest fill and a rotation up to 25°. A
    cell has no upper side, so here it is any rotation and a vertical flip too; stains and lamps differ, so brightness,
    contrast, saturation and each colour's strength vary as well.
    """
    changed = keras.ops.image.affine_transform(
        ops.cast(images, "float32"),
        _transforms(draws, images.shape[1]),
        interpolation="bilinear",
        fill_mode="nearest",
    )
    changed = _recoloured(changed, draws)
    return ops.cast(ops.clip(ops.round(changed), 0, 255), "uint8")


def _transforms(draws: Any, size: int) -> Any:
    """The eight numbers of each image's transform, from places in the new image to places in the old one, (n, 8)."""
    angle = 2 * math.pi * draws[:, 0]
    zoom = 1 + _spread(draws[:, 1], _ZOOM)
    shear = _spread(draws[:, 2], _SHEAR)
    shift_x, shift_y = (size * _spread(draws[:, i], _SHIFT) for i in (3, 4))
    flip_x, flip_y = (ops.where(draws[:, i] < 0.5, 1.0, -1.0) for i in (5, 6))
    cos, sin = zoom * ops.cos(angle), zoom * ops.sin(angle)
    a, b = flip_x * cos, flip_y * (shear * cos - sin)
    c, d = flip_x * sin, flip_y * (shear * sin + cos)
    centre = (size - 1) / 2
    offset_x = centre - (a + b) * centre + shift_x
    offset_y = centre - (c + d) * centre + shift_y
    zero = ops.zeros_like(a)
    return ops.stack([a, b, offset_x, c, d, offset_y, zero, zero], axis=1)


def _recoloured(images: Any, draws: Any) -> Any:
    """Strength of each colour, saturation and brightness as one matrix; contrast about the image's own mean."""
    strength = 1 + _spread(draws[:, 9:12], _STAIN)
    saturation = (1 + _spread(draws[:, 12], _SATURATION))[:, None, None]
    brightness = (1 + _spread(draws[:, 7], _BRIGHTNESS))[:, None, None]
    contrast = (1 + _spread(draws[:, 8], _CONTRAST))[:, None, None]
    grey = ops.tile(ops.convert_to_tensor(_GREY, "float32")[:, None], (1, 3))
    mixed = saturation * ops.eye(3) + (1 - saturation) * grey
    matrix = brightness * strength[:, :, None] * mixed
    size = images.shape[1]
    pixels = ops.reshape(images, (-1, size * size, 3))
    mean = ops.mean(pixels, axis=1, keepdims=True)
    pixels = ops.matmul(pixels, contrast * matrix) + (1 - contrast) * ops.matmul(mean, matrix)
    return ops.reshape(pixels, (-1, size, size, 3))


def _spread(draw: Any, by: float) -> Any:
    """0..1 → -by..by."""
    return (2 * draw - 1) * by
