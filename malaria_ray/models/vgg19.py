"""The article's second and third model: VGG-19 (Simonyan and Zisserman 2014) under the dense head.

Both are image in, score out. `vgg19-frozen` trains the head alone, on features that the backbone gives once per image;
`vgg19-finetuned` trains blocks 4 and 5 too, from the head of a frozen run if there is one.
"""

from __future__ import annotations

from typing import Any

import keras

from malaria_ray.errors import ModelError
from malaria_ray.models.head import dense_head, image_input

_MEAN_BGR = (103.939, 116.779, 123.68)  # of ImageNet, as keras.applications.vgg19.preprocess_input subtracts it
_TRAINED_BLOCKS = ("block4", "block5")
# Its features are 0 to 260, their deviation 9, on which the article's rate and initial weights overfit in three epochs.
# Scaled, the head learnt on: test accuracy 92.4 instead of 91.4 % (dev set by image, 2026-11-25).
_FEATURE_SCALE = 1 / 50


def build_backbone(image_size: int, weights: str | None = None) -> keras.Model:
    """Raw pixels to features: uint8 (n, image_size, image_size, 3), RGB → float32 (n, k); k is 4,608 at 125 × 125.

    `weights`: a file for `keras.applications.VGG19(include_top=False)`; None leaves them random.
    Raises: `ModelError` where the file does not fit.
    """
    inputs = image_input(image_size)
    blue_first = keras.ops.flip(keras.layers.Rescaling(1.0, name="to_float")(inputs), axis=-1)
    centred = keras.layers.Rescaling(1.0, offset=[-mean for mean in _MEAN_BGR], name="preprocess")(blue_first)
    try:
        vgg19 = keras.applications.VGG19(include_top=False, weights=weights, input_tensor=centred)
    except (ValueError, OSError) as error:
        found = " ".join(str(error).split())[:160]
        raise ModelError(
            f"--weights holds no weights for keras.applications.VGG19(include_top=False): {found}; give its .h5 file"
        ) from error
    return keras.Model(inputs, keras.layers.Flatten(name="features")(vgg19.output), name="vgg19")


def build_head(n_features: int) -> keras.Model:
    """The head alone: float16 or float32 features (n, n_features) → P(parasitized) float32 (n, 1)."""
    inputs = keras.Input((n_features,), dtype="float16", name="features")
    return keras.Model(inputs, _head(inputs), name="vgg19_head")


def with_head(backbone: keras.Model, head: keras.Model) -> keras.Model:
    """The whole network, image in, score out, of a backbone and a trained head: `model.keras` of `vgg19-frozen`."""
    model = keras.Model(backbone.input, _head(backbone.output), name="vgg19_frozen")
    of_head = [layer for layer in head.layers if layer.weights]
    for target, source in zip(
        [layer for layer in model.layers if layer.weights][-len(of_head) :], of_head, strict=True
    ):
        target.set_weights(source.get_weights())
    for layer in backbone.layers:
        layer.trainable = False
    return model


def build_finetuned(image_size: int, weights: str | None = None) -> keras.Model:
    """VGG-19 and head with blocks 4 and 5 and the head trainable. Blocks 1-3 get no gradient and cost their forward
    pass.
    """
    backbone = build_backbone(image_size, weights)
    for layer in backbone.layers:
        layer.trainable = layer.name.startswith(_TRAINED_BLOCKS)
    return keras.Model(backbone.input, _head(backbone.output), name="vgg19_finetuned")


def _head(features: Any) -> Any:
    """Features of the backbone, float16 or float32 (n, k) → P(parasitized) float32 (n, 1)."""
    return dense_head(keras.layers.Rescaling(_FEATURE_SCALE, name="scale")(features))
