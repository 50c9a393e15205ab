"""Grad-CAM on networks whose answer is known, and on the three architectures as they are saved."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from malaria_ray.cells.heat import overlay
from malaria_ray.errors import ModelError
from malaria_ray.models import cnn, vgg19
from malaria_ray.models.gradcam import grad_cam


def corner_model(weight: float, bias: float = 0.0) -> keras.Model:
    """A 1 × 1 convolution that passes red on, and a dense layer that looks at the upper left quarter alone."""
    image = keras.Input((8, 8, 3), dtype="uint8")
    red = keras.layers.Conv2D(1, 1, use_bias=False)(keras.layers.Rescaling(1 / 255)(image))
    seen = keras.layers.Cropping2D(((0, 4), (0, 4)))(red)
    score = keras.layers.Dense(1, activation="sigmoid", name="score")(keras.layers.Flatten()(seen))
    model = keras.Model(image, score)
    model.layers[2].set_weights([np.array([1, 0, 0], np.float32).reshape(1, 1, 3, 1)])
    model.layers[-1].set_weights([np.full((16, 1), weight, np.float32), np.array([bias], np.float32)])
    return model


@pytest.mark.parametrize(
    ("weight", "called", "is_hot"),
    [
        (1.0, 1, True),
        (100.0, 1, True),  # the score is 1.0 exactly: its own gradient is 0
        (1.0, 0, False),  # nothing speaks for uninfected
        (-100.0, 0, True),
    ],
)
def test_heat_is_what_the_weights_say(weight, called, is_hot):
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    pixels[0, 1, 2, 0], pixels[0, 6, 6, 1] = 255, 255  # green is not seen
    expected = np.zeros((1, 8, 8), np.float32)
    expected[0, 1, 2] = is_hot
    found = grad_cam(corner_model(weight), pixels, called=np.array([called]))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32


@pytest.mark.parametrize("name", ["cnn", "vgg19-frozen", "vgg19-finetuned"])
def test_each_saved_architecture_gives_heat(name, tmp_path):
    if name == "cnn":
        model = cnn.build(32)
    elif name == "vgg19-frozen":
        backbone = vgg19.build_backbone(32)
        model = vgg19.with_head(backbone, vgg19.build_head(backbone.output.shape[-1]))
    else:
        model = vgg19.build_finetuned(32)
    model.save(tmp_path / "model.keras")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    saved = (tmp_path / "model.keras").read_bytes()
    both = np.stack([grad_cam(saved, pixels, called=np.full(2, label)) for label in (0, 1)])
    assert both.shape == (2, 2, 32, 32)
    assert both.min() >= 0
    assert both.max() == 1


def test_a_model_without_a_convolution_is_refused():
    image = keras.Input((8, 8, 3), dtype="uint8")
    score = keras.layers.Dense(1, activation="sigmoid")(keras.layers.Flatten()(keras.layers.Rescaling(1.0)(image)))
    with pytest.raises(ModelError, match="no convolution"):
        grad_cam(keras.Model(image, score), np.zeros((1, 8, 8, 3), np.uint8))


def test_an_overlay_leaves_the_crop_where_there_is_no_heat():
    crop = np.full((4, 4, 3), 100, np.uint8)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0] = 1
    found = overlay(crop, heat)
    assert (found[1:] == 100).all()
    assert (found[0, 0] != 100).any()
