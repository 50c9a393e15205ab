"""Where a Keras model looks: Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) on its last convolution."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from malaria_ray.cells.images import Pixels
from malaria_ray.errors import ModelError

Heat = npt.NDArray[np.float32]

_BATCH_SIZE = 16  # the last feature map and its gradient are held for so many images at a time


def grad_cam(model: bytes | Any, pixels: Pixels, *, called: npt.NDArray[Any] | None = None) -> Heat:
    """Heat of each image, 0..1, its own maximum 1: float32 (n, size, size); all 0 where nothing speaks for the class.

    `model`: the content of `model.keras`, loaded in safe mode, or a loaded `keras.Model`. `pixels`: uint8 (n, size,
    size, 3), RGB. `called`: the class that is explained, 1 parasitized or 0 uninfected, (n,); by default the likelier.
    The gradient is that of the logit of that class, not of the score, which is flat where the model is sure.
    Raises: `ModelError` where the model has no convolution, no sigmoid at its end, or another image size.
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        raise ModelError(f"Grad-CAM needs Keras on TensorFlow, not on {keras.backend.backend()}; set KERAS_BACKEND")
    import tensorflow as tf

    network = _load(model) if isinstance(model, bytes) else model
    last, convolution = network.layers[-1], _last_convolution(network)
    if not isinstance(last, keras.layers.Dense) or last.units != 1 or last.activation is not keras.activations.sigmoid:
        raise ModelError(f"the model ends in {last.name!r}; Grad-CAM needs a dense layer of one sigmoid there")
    if tuple(network.input.shape[1:]) != pixels.shape[1:]:
        raise ModelError(f"the model takes {tuple(network.input.shape[1:])}, the images are {pixels.shape[1:]}")
    to_map = keras.Model(network.input, convolution.output)
    from_map = keras.Model(convolution.output, last.input)
    kernel, bias = (tf.cast(variable.value, tf.float32) for variable in (last.kernel, last.bias))

    heat = np.zeros(pixels.shape[:3], np.float32)
    for start in range(0, len(pixels), _BATCH_SIZE):
        piece = slice(start, start + _BATCH_SIZE)
        feature_map = to_map(pixels[piece], training=False)
        with tf.GradientTape() as tape:
            tape.watch(feature_map)  # a frozen network has no variable that would be watched by itself
            hidden = from_map(feature_map, training=False)
            logit = (tf.cast(hidden, tf.float32) @ kernel + bias)[:, 0]
        gradient = tf.cast(tape.gradient(logit, feature_map), tf.float32).numpy()
        is_parasitized = logit.numpy() >= 0 if called is None else np.asarray(called[piece]) == 1
        sign = np.where(is_parasitized, 1, -1)[:, None]
        weights = sign * gradient.mean(axis=(1, 2))  # (n, channels), the paper's equation 1
        maps = np.einsum("nhwc,nc->nhw", tf.cast(feature_map, tf.float32).numpy(), weights)
        for row, coarse in enumerate(np.maximum(maps, 0), start=start):
            fine = cv2.resize(coarse.astype(np.float32), pixels.shape[2:0:-1], interpolation=cv2.INTER_LINEAR)
            heat[row] = fine / fine.max() if fine.max() > 0 else 0
    return heat


def _load(model: bytes) -> Any:
    import keras

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.keras"
        file.write_bytes(model)
        try:
            return keras.saving.load_model(file, compile=False, safe_mode=True)
        except (ValueError, OSError) as error:
            raise ModelError(f"model.keras cannot be loaded: {error}") from error


def _last_convolution(network: Any) -> Any:
    import keras

    found = [layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D)]
    if not found:
        raise ModelError(f"the model {network.name!r} has no convolution of its own; Grad-CAM needs one")
    return found[-1]
