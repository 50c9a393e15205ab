"""What a trained network says of the images that a run learns from after training: scores and features, by the very
file that screening will use, and the engine that it uses on CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from malaria_ray.models.engines import Features, Scores, open_engine
from malaria_ray.models.training import Examples
from malaria_ray.statistics.novelty import Novelty, fit_novelty

_BATCH_SIZE = 64
_N_LEARNT_FROM = 2048  # training images whose features stand for all: four for each number of a feature vector
_AT_ONCE = 1024


@dataclass(frozen=True)
class Validated:
    """`scores`: float32 (n,) of the validation images in their order; `novelty`: of the training and validation set."""

    scores: Scores
    novelty: Novelty


def validate(onnx: bytes, *, train: Examples, val: Examples, seed: int, n_threads: int) -> Validated:
    """Scores all validation images by `model.onnx`; learns from their features and those of some training images what
    is usual. Both hold images, uint8 (n, size, size, 3). Raises: `ModelError`, `DatasetError`.
    """
    engine = open_engine("ncnn", onnx, n_threads=n_threads, batch_size=_BATCH_SIZE)

    def described(examples: Examples, chosen: npt.NDArray[np.int64]) -> tuple[Scores, Features]:
        pieces = (chosen[start : start + _AT_ONCE] for start in range(0, len(chosen), _AT_ONCE))
        found = [engine.describe(examples.take(piece)) for piece in pieces]
        scores, features = zip(*found, strict=True)
        return np.concatenate(scores), np.concatenate(features)

    scores, val_features = described(val, np.arange(len(val)))
    n = min(_N_LEARNT_FROM, len(train))
    chosen = np.sort(np.random.default_rng([seed, n]).choice(len(train), n, replace=False))
    _, train_features = described(train, chosen)
    return Validated(scores, fit_novelty(train_features, train.label[chosen], val_features))
