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

MAX_DIFFERENCE = 1e-4
"""The two files may differ by this much in any score; 2e-7 is what was seen."""


def export(checkpoint: str, *, probe: Pixels) -> dict[str, Any]:
    """Reads `model.keras` in the folder `checkpoint`, returns {"keras": bytes, "onnx": bytes, "max_difference",
    "parameters"}.

    `probe`: real crops, uint8 (n, size, size, 3), that both files must score alike.
    Raises: `ModelError` where a score differs by more than `MAX_DIFFERENCE`.
    """
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    import keras
    import onnxruntime

    model = keras.saving.load_model(Path(checkpoint) / "model.keras", compile=False)
    expected = np.asarray(model.predict_on_batch(probe)).reshape(-1)  # a loaded model exports only after a first call
    with tempfile.TemporaryDirectory() as folder:
        keras_file, onnx_file = Path(folder) / "model.keras", Path(folder) / "model.onnx"
        model.save(keras_file)
        model.export(str(onnx_file), format="onnx", verbose=False)
        session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: probe})[0].reshape(-1)
        difference = float(np.abs(found - expected).max())
        if not difference <= MAX_DIFFERENCE:
            raise ModelError(
                f"model.onnx and model.keras differ by {difference:.2g} on real crops; at most {MAX_DIFFERENCE} is "
                f"allowed"
            )
        return {
            "keras": keras_file.read_bytes(),
            "onnx": onnx_file.read_bytes(),
            "max_difference": difference,
            "parameters": {
                "total": int(model.count_params()),
                "trainable": int(sum(np.prod(weight.shape) for weight in model.trainable_weights)),
            },
        }
