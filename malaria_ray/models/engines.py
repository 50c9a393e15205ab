"""The engines that score a batch: ONNX Runtime or OpenVINO on `model.onnx`, Keras on `model.keras`."""

from __future__ import annotations

import contextlib
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from malaria_ray.cells.images import Pixels
from malaria_ray.errors import ModelError

EngineName = Literal["onnx", "keras", "openvino-bf16"]
MODEL_FILE: dict[EngineName, str] = {"onnx": "model.onnx", "keras": "model.keras", "openvino-bf16": "model.onnx"}

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

Scores = npt.NDArray[np.float32]
Features = npt.NDArray[np.float32]


class Engine(ABC):
    """A network that takes `_batch_size` images at a time."""

    _batch_size: int

    @abstractmethod
    def _predict(self, batch: Pixels) -> list[Scores]:
        """Each output of the network for one full batch; the first is the scores, the second the features."""

    def score(self, pixels: Pixels) -> Scores:
        """P(parasitized) of each image: uint8 (n, size, size, 3), RGB, 0..255 → float32 (n,), 0..1."""
        return _checked(self.outputs(pixels)[0])

    def describe(self, pixels: Pixels) -> tuple[Scores, Features]:
        """The same scores, and the features before them, float32 (n, k), what the network's last layer sees."""
        scores, features = self.outputs(pixels)
        return _checked(scores), features

    def outputs(self, pixels: Pixels) -> list[Scores]:
        """What the network gives for each image, output by output: float32 (n, k)."""
        return _in_batches(self._predict, pixels, self._batch_size)


def open_engine(name: EngineName, model: bytes, *, n_threads: int, batch_size: int, use_gpu: bool = False) -> Engine:
    """The engine `name` on the content of its model file; it computes with `n_threads` threads, `batch_size` images
    at a time, on the GPU that this process sees where `use_gpu` is set and the library can.
    """
    if name == "onnx":
        return OnnxEngine(model, n_threads=n_threads, batch_size=batch_size, use_gpu=use_gpu)
    if name == "openvino-bf16":
        return OpenVinoEngine(model, n_threads=n_threads, batch_size=batch_size)
    return KerasEngine(model, n_threads=n_threads, batch_size=batch_size)


def gpu_fault(name: EngineName) -> str | None:
    """Why the engine cannot use a GPU in this process; None where it can."""
    if name == "onnx":
        import onnxruntime

        found = onnxruntime.get_available_providers()
        return None if _CUDA in found else f"ONNX Runtime has no {_CUDA} here, only {', '.join(found)}"
    import keras

    if keras.backend.backend() != "tensorflow":
        return None  # other backends find their devices by themselves
    import tensorflow as tf

    return None if tf.config.list_physical_devices("GPU") else "TensorFlow sees no GPU here"


def bf16_fault() -> str | None:
    """Why this process cannot compute by OpenVINO in bfloat16; None where it can."""
    try:
        import openvino
    except ImportError:
        return "--engine openvino-bf16 needs the package openvino on every node: pip install 'malaria-ray[openvino]'"
    core = openvino.Core()
    if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return None
    return (
        f"--engine openvino-bf16: the CPU {core.get_property('CPU', 'FULL_DEVICE_NAME')} does not compute in bfloat16; "
        "take --engine onnx, or nodes with AVX512_BF16 or AMX"
    )


class OnnxEngine(Engine):
    """ONNX Runtime: starts in well under a second, scores twice as fast as Keras on CPUs, needs no TensorFlow."""

    def __init__(self, model: bytes, *, n_threads: int, batch_size: int, use_gpu: bool = False):
        import onnxruntime

        if use_gpu and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # CUDA's libraries may lie in wheels, where no loader looks
        providers = [_CUDA, _CPU] if use_gpu and _CUDA in onnxruntime.get_available_providers() else [_CPU]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=providers)
        except Exception as error:  # its exceptions have no common base of their own
            raise ModelError(f"model.onnx cannot be loaded: {error}") from error
        self._input = self._session.get_inputs()[0].name
        self._batch_size = batch_size

    def _predict(self, batch: Pixels) -> list[Scores]:
        outputs: list[Scores] = self._session.run(None, {self._input: batch})
        return outputs


class OpenVinoEngine(Engine):
    """OpenVINO on CPUs that compute in bfloat16 (8 bits of precision): twice as fast as ONNX Runtime's float32."""

    def __init__(self, model: bytes, *, n_threads: int, batch_size: int):
        if fault := bf16_fault():  # nothing is scored more slowly, or otherwise, in silence
            raise ModelError(fault)
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": n_threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # pinned, the actors of a node would all compute on its first cores
        }
        core = openvino.Core()
        try:
            network = core.read_model(model)
            network.reshape([batch_size, *list(network.input(0).partial_shape)[1:]])
            self._request = core.compile_model(network, "CPU", settings).create_infer_request()
        except RuntimeError as error:
            raise ModelError(f"model.onnx cannot be loaded by OpenVINO: {' '.join(str(error).split())}") from error
        self._batch_size = batch_size

    def _predict(self, batch: Pixels) -> list[Scores]:
        self._request.infer({0: batch})
        return [output.data.copy() for output in self._request.output_tensors]


class KerasEngine(Engine):
    """Keras' own prediction, on whatever backend and device Keras is set to. Loaded in safe mode: no code from the
    file runs.
    """

    def __init__(self, model: bytes, *, n_threads: int, batch_size: int):
        import keras

        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            with contextlib.suppress(RuntimeError):  # where TensorFlow has begun in this process, its threads stay
                tf.config.threading.set_intra_op_parallelism_threads(n_threads)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.keras"
            file.write_bytes(model)
            try:
                self._model = keras.saving.load_model(file, compile=False, safe_mode=True)
            except (ValueError, OSError) as error:
                raise ModelError(f"model.keras cannot be loaded: {error}") from error
        self._model = keras.Model(self._model.input, [self._model.output, self._model.layers[-1].input])
        self._batch_size = batch_size

    def _predict(self, batch: Pixels) -> list[Scores]:
        outputs: list[Scores] = self._model.predict_on_batch(batch)
        return outputs


def _in_batches(predict: Any, pixels: Pixels, batch_size: int) -> list[Scores]:
    """Predicts `batch_size` images at a time, the last batch padded: one shape only, so no result depends on its
    batch.
    """
    results = []
    for start in range(0, max(1, len(pixels)), batch_size):  # one batch of padding tells the shapes where there is none
        batch = pixels[start : start + batch_size]
        n = len(batch)
        if n < batch_size:
            batch = np.concatenate([batch, np.zeros((batch_size - n, *batch.shape[1:]), np.uint8)])
        results.append([np.asarray(output, np.float32)[:n] for output in predict(batch)])
    return [np.concatenate(outputs) for outputs in zip(*results, strict=True)]


def _checked(outputs: Scores) -> Scores:
    """The scores as (n,). Raises: `ModelError` where one is no number in 0..1."""
    scores = outputs.reshape(-1)
    bad = scores[~((scores >= 0) & (scores <= 1))]
    if len(bad):
        raise ModelError(
            f"the model gave {len(bad)} of {len(scores)} scores outside 0..1, {bad[0]} the first; train it anew"
        )
    return scores
