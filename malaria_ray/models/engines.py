"""The engines that score a batch: ncnn or ONNX Runtime on `model.onnx`, Keras on `model.keras`."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import platform
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from upath import UPath

from malaria_ray.cells.images import Pixels, resize
from malaria_ray.cells.synthetic import synthetic_cell
from malaria_ray.errors import ModelError
from malaria_ray.models.trunk import cut
from malaria_ray.schema import Label

log = logging.getLogger("malaria_ray")

EngineName = Literal["ncnn", "onnx", "keras"]
MODEL_FILE: dict[EngineName, str] = {"ncnn": "model.onnx", "onnx": "model.onnx", "keras": "model.keras"}
MAX_DIFFERENCE = 1e-4
"""How far the scores of a network's two files, or of two engines in float32, may lie apart; 2e-6 is what was seen."""

_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

Scores = npt.NDArray[np.float32]
Features = npt.NDArray[np.float32]


class Engine(ABC):
    """A network that takes `_batch_size` images at a time; `name` is what computes it."""

    name: ClassVar[EngineName]
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
    at a time, on the GPU that this process sees where `use_gpu` is set and the library can. ONNX Runtime's instead of
    ncnn's where that cannot be had on this machine or computes otherwise. Raises: `ModelError`.
    """
    if name == "keras":
        return KerasEngine(model, n_threads=n_threads, batch_size=batch_size)
    if name == "ncnn":
        try:
            return NcnnEngine(model, n_threads=n_threads, batch_size=batch_size)
        except (ModelError, ImportError, OSError) as error:
            log.warning("all is computed by ONNX Runtime, which is slower: %s", error)
    return OnnxEngine(model, n_threads=n_threads, batch_size=batch_size, use_gpu=use_gpu)


def read_run_file(file: UPath, *, sha256: str) -> bytes:
    """A file of a run, its SHA-256 checked: one that was replaced must not give scores under the run's name.

    Raises: `ModelError`.
    """
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing; train the run anew or restore the file") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ModelError(f"{file} is not the file that training wrote (its SHA-256 differs); restore it or train anew")
    return data


def gpu_fault(name: EngineName) -> str | None:
    """Why the engine cannot use a GPU in this process; None where it can."""
    if name != "keras":
        import onnxruntime

        found = onnxruntime.get_available_providers()
        return None if _CUDA in found else f"ONNX Runtime has no {_CUDA} here, only {', '.join(found)}"
    import keras

    if keras.backend.backend() != "tensorflow":
        return None  # other backends find their devices by themselves
    import tensorflow as tf

    return None if tf.config.list_physical_devices("GPU") else "TensorFlow sees no GPU here"


class OnnxEngine(Engine):
    """ONNX Runtime, on CPUs or a GPU: starts in well under a second, needs no TensorFlow."""

    name = "onnx"

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


class NcnnEngine(Engine):
    """The convolutions by ncnn, image by image, the rest by ONNX Runtime: on CPUs 1.5 (cnn) to 2 times (VGG-19) as fast
    as that alone. Computes in float32. Raises: `ModelError` where the two disagree on this machine.
    """

    name = "ncnn"

    def __init__(self, model: bytes, *, n_threads: int, batch_size: int):
        import ncnn

        parts = cut(model)
        self._before = OnnxEngine(parts.before, n_threads=n_threads, batch_size=batch_size)
        cells = _drawn_cells(*self._before._session.get_inputs()[0].shape[1:3])
        line = OnnxEngine(parts.line, n_threads=n_threads, batch_size=len(Label))
        images: Any = self._before._predict(cells)
        expected: Any = line._predict(*images)
        del line  # so that its memory is free again before ncnn takes its own
        self._behind = OnnxEngine(parts.behind, n_threads=n_threads, batch_size=batch_size)
        self._as_mat, self._end = ncnn.Mat, parts.end
        self._trunk = ncnn.Net()
        self._trunk.opt.num_threads = n_threads
        for half in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_packed", "bf16_storage"):
            setattr(self._trunk.opt, f"use_{half}", False)
        with tempfile.TemporaryDirectory() as folder:  # ncnn would read weights in memory after Python has freed them
            layers, weights = Path(folder) / "layers", Path(folder) / "weights"
            layers.write_text(parts.layers)
            weights.write_bytes(parts.weights)
            if self._trunk.load_param(str(layers)) or self._trunk.load_model(str(weights)):
                raise ModelError("ncnn cannot load the convolutions of model.onnx")
        self._batch_size = batch_size
        self._check(cells, *expected)

    def _predict(self, batch: Pixels) -> list[Scores]:
        return self._behind._predict(self._convolutions(batch))

    def _convolutions(self, batch: Pixels) -> npt.NDArray[Any]:
        [images] = self._before._predict(batch)
        return np.stack([self._convolved(image) for image in images])

    def _convolved(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        extractor = self._trunk.create_extractor()
        extractor.input("at0", self._as_mat(image))
        fault, found = extractor.extract(self._end)
        if fault:
            raise ModelError(f"ncnn could not compute the convolutions (its error {fault}): memory may have run out")
        return np.asarray(found)

    def _check(self, cells: Pixels, expected: npt.NDArray[Any]) -> None:
        """Compares with ONNX Runtime what the convolutions give for drawn cells, relative to its largest value, and
        what the network makes of it. For images that leave all convolutions at 0 neither would tell anything.
        """
        convolved = self._convolutions(cells)
        largest = np.abs(expected).max()
        if not largest > 0:
            raise ModelError("the convolutions of model.onnx give nothing but 0 for drawn cells: none could be checked")
        found = [convolved / largest, *self._behind._predict(convolved)]
        for ours, theirs in zip(found, [expected / largest, *self._behind._predict(expected)], strict=True):
            difference = float(np.abs(ours - theirs).max() / max(1, np.abs(theirs).max()))
            if not difference <= MAX_DIFFERENCE:
                raise ModelError(
                    f"ncnn and ONNX Runtime differ by {difference:.2g} on this machine ({platform.machine()}), at most "
                    f"{MAX_DIFFERENCE} is allowed"
                )


def _drawn_cells(height: int, width: int) -> Pixels:
    """A synthetic cell of each class, uint8 (2, height, width, 3): noise leaves a trained network's ReLUs at 0."""
    size = max(height, width)
    cells = [synthetic_cell(label, seed=0, patient=0, index=0) for label in Label]
    return np.stack([resize(cell, size)[:height, :width] for cell in cells])


class KerasEngine(Engine):
    """Keras' own prediction, on whatever backend and device Keras is set to. Loaded in safe mode: no code from the
    file runs.
    """

    name = "keras"

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
