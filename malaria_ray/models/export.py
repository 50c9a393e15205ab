"""From a checkpoint to the files that score: `model.keras` without its optimizer and the same network as
`model.onnx`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from malaria_ray.cells.images import Pixels
from malaria_ray.errors import ModelError
from malaria_ray.models import ModelName
from malaria_ray.models.building import build_trainable, whole_network
from malaria_ray.models.engines import MAX_DIFFERENCE


def export(
    checkpoint: str, *, model_name: ModelName, image_size: int, weights: bytes | None, probe: Pixels
) -> dict[str, Any]:
    """Reads `model.keras` in the folder `checkpoint`, returns {"keras": bytes, "onnx": bytes, "max_difference",
    "parameters", "layers"}. The head of `vgg19-frozen` is put on its backbone, whose `weights` file is needed for that.

    `probe`: real crops, uint8 (n, size, size, 3), that both files must score alike.
    Raises: `ModelError` where a score differs by more than `MAX_DIFFERENCE`.
    """
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    import keras
    import onnxruntime

    trained = keras.saving.load_model(Path(checkpoint) / "model.keras", compile=False)
    n_features = trained.inputs[0].shape[1] if model_name == "vgg19-frozen" else None
    model = build_trainable(model_name, image_size=image_size, n_features=n_features)  # float32, however it was trained
    model.set_weights(trained.get_weights())
    if model_name == "vgg19-frozen":
        model = whole_network(model, image_size=image_size, weights=weights)
    expected = np.asarray(model.predict_on_batch(probe)).reshape(-1)
    with tempfile.TemporaryDirectory() as folder:
        keras_file = Path(folder) / "model.keras"
        model.save(keras_file)
        onnx = to_onnx(with_features(model))
        session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: probe})[0].reshape(-1)
        difference = float(np.abs(found - expected).max())
        if not difference <= MAX_DIFFERENCE:
            raise ModelError(
                f"model.onnx and model.keras differ by {difference:.2g} on real crops; at most {MAX_DIFFERENCE} is "
                f"allowed"
            )
        return {
            "keras": keras_file.read_bytes(),
            "onnx": onnx,
            "max_difference": difference,
            "parameters": {
                "total": int(model.count_params()),
                "trainable": _n_weights(model.trainable_weights),
            },
            "layers": [
                {
                    "layer": layer.name,
                    "parameters": int(layer.count_params()),
                    "trainable": _n_weights(layer.trainable_weights),
                }
                for layer in model.layers
                if layer.weights
            ],
        }


def with_features(model: Any) -> Any:
    """The network with a second output behind the score: float32 (n, 512), what its last layer sees of each image."""
    import keras

    described = keras.Model(model.input, [model.output, model.layers[-1].input], name=model.name)
    described.predict_on_batch(np.zeros((1, *model.input.shape[1:]), np.uint8))  # exports only after a first call
    return described


def to_onnx(model: Any) -> bytes:
    """The network as ONNX, any number of images at a time. `model` must have been called on data."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        model.export(str(file), format="onnx", verbose=False)
        return file.read_bytes()


def _n_weights(weights: Any) -> int:
    return int(sum(np.prod(weight.shape) for weight in weights))
