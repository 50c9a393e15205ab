"""The networks by name, built inside the process that trains or exports: Keras is loaded no sooner."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from malaria_ray.models import ModelName

if TYPE_CHECKING:
    import keras


def build_trainable(
    name: ModelName,
    *,
    image_size: int,
    n_features: int | None = None,
    weights: bytes | None = None,
    initial_model: bytes | None = None,
) -> keras.Model:
    """What is trained for a model: `cnn` and `vgg19-finetuned` whole, of `vgg19-frozen` the head on `n_features`.

    `weights`: content of a VGG-19 weights file; `initial_model`: content of a `model.keras` to take all weights from.
    """
    if name == "cnn":
        from malaria_ray.models import cnn

        return cnn.build(image_size)
    from malaria_ray.models import vgg19

    if name == "vgg19-frozen":
        assert n_features is not None
        return vgg19.build_head(n_features)
    with _as_file(weights, ".h5") as file:
        model = vgg19.build_finetuned(image_size, file)
    if initial_model is not None:
        import keras

        with _as_file(initial_model, ".keras") as file:
            model.set_weights(keras.saving.load_model(file, compile=False, safe_mode=True).get_weights())
    return model


def build_backbone(*, image_size: int, weights: bytes | None) -> keras.Model:
    """VGG-19 up to its features, with the content of a weights file."""
    from malaria_ray.models import vgg19

    with _as_file(weights, ".h5") as file:
        return vgg19.build_backbone(image_size, file)


def whole_network(head: keras.Model, *, image_size: int, weights: bytes | None) -> keras.Model:
    """Image in, score out, of a trained head."""
    from malaria_ray.models import vgg19

    return vgg19.with_head(build_backbone(image_size=image_size, weights=weights), head)


@contextmanager
def _as_file(content: bytes | None, suffix: str) -> Iterator[str | None]:
    """A path that holds `content` for a while, for libraries that read files only; None for None."""
    if content is None:
        yield None
        return
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        Path(file.name).write_bytes(content)
        yield file.name
