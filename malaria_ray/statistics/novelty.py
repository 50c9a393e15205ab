"""How far an image lies from those that a model has learnt from, by the model's own features.

A network gives a confident score to anything. The distance of its features to those of its training set tells a cell
from what the training set did not hold: Lee et al. 2018, A simple unified framework for detecting out-of-distribution
samples and adversarial attacks, eq. 1 and 2 (Mahalanobis distance to the nearest class, one covariance for all).

Throughout, `features` are (n, d) float32 or float64, finite: one row of d numbers an image, the activations of the
layer before the last, say.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from malaria_ray.errors import DatasetError, ModelError
from malaria_ray.schema import Label
from malaria_ray.statistics.metrics import Floats, check_labels, check_lengths

Features = NDArray[np.float32]

_AT_ONCE = 4096


@dataclass(frozen=True, eq=False, kw_only=True)
class Novelty:
    """What a model's training set looked like to it; stored with the run.

    means      (c, d) float32, the mean of each class that the training set has
    whitening  (d, d) float32, takes a difference from a mean to a vector of unit covariance
    threshold  distance that the wanted share of validation images does not exceed
    """

    means: Features
    whitening: Features
    threshold: float

    def distance(self, features: ArrayLike) -> Features:
        """(n,) float32, 0 or more: Mahalanobis distance to the nearest class, divided by √d, so about 1 for images
        like those learnt from, whatever d.

        Raises ModelError for features of another length, DatasetError for ones that are not finite.
        """
        rows = _check_features(features)
        if rows.shape[1] != self.means.shape[1]:
            raise ModelError(
                f"features have {rows.shape[1]} numbers, those of the training set had {self.means.shape[1]}: they are "
                "of another model; fit anew"
            )
        return _distance(rows, self.means, self.whitening)

    def to_bytes(self) -> bytes:
        """The content of an .npz file."""
        file = io.BytesIO()
        np.savez(file, means=self.means, whitening=self.whitening, threshold=np.float64(self.threshold))
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Novelty:
        """Raises ModelError where the bytes are not those of `to_bytes`."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return cls(means=arrays["means"], whitening=arrays["whitening"], threshold=float(arrays["threshold"]))
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ModelError(f"the novelty of the run cannot be read: {error}; train the run anew") from error


def fit_novelty(
    features: ArrayLike, label: ArrayLike, validation_features: ArrayLike, *, share: float = 0.99
) -> Novelty:
    """Novelty from the features and labels of the training set and the features of the validation set.

    label  (n,) of 0, 1 or null; null is left out
    share  of validation images that are not novel, in 0..1. Training images lie nearer than any others and cannot
        say; validation images are of other patients and can

    The covariance is shrunk towards a multiple of the identity by oracle approximating shrinkage, scikit-learn's `oas`
    (Chen et al. 2010, Shrinkage algorithms for MMSE covariance estimation, without the 2 / p of eq. 23), so that it
    exists for fewer images than numbers and for numbers that never vary. 512 numbers of 20,000 images take half a
    second and make 1 MB, and a distance 13 µs.

    Raises DatasetError for features or labels that cannot be used, and fewer than two labelled images.
    """
    rows, validation = _check_features(features), _check_features(validation_features)
    labels = check_labels(label, nullable=True)
    check_lengths(features=len(rows), label=len(labels))
    if validation.shape[1] != rows.shape[1] or not len(validation):
        raise DatasetError(
            f"validation features have shape {validation.shape}: allowed are one or more rows of "
            f"{rows.shape[1]} numbers"
        )
    classes = [value for value in Label if np.any(labels == value)]
    n = int(np.sum(~np.isnan(labels)))
    if n < 2:
        raise DatasetError(f"{n} labelled training images: there must be 2 or more to learn from how they vary")
    if not 0 < share <= 1:
        raise DatasetError(f"share is {share}: allowed is above 0 and up to 1")
    means = np.stack([rows[labels == value].mean(axis=0, dtype=np.float64) for value in classes])
    centred = np.concatenate([rows[labels == value] - mean for value, mean in zip(classes, means, strict=True)])
    whitening = _whitening(_shrunk_covariance(centred.astype(np.float64)))
    threshold = float(np.quantile(_distance(validation, means.astype(np.float32), whitening), share))
    return Novelty(means=means.astype(np.float32), whitening=whitening, threshold=threshold)


def _distance(features: Features, means: Features, whitening: Features) -> Features:
    found = np.empty(len(features), np.float32)
    for start in range(0, len(features), _AT_ONCE):
        rows = features[start : start + _AT_ONCE]
        # A product for each row: BLAS adds up in another order where a matrix has another height, and the last digit of
        # an image's distance would hang on its neighbours.
        squares = [np.square((rows - mean)[:, None, :] @ whitening).mean(axis=(1, 2)) for mean in means]
        found[start : start + _AT_ONCE] = np.sqrt(np.min(squares, axis=0))
    return found


def _shrunk_covariance(centred: Floats) -> Floats:
    """(d, d) covariance of the rows of (n, d) around 0, shrunk towards its mean variance."""
    from sklearn.covariance import oas  # actors, which never fit, start sooner without it

    if not centred.any():
        raise DatasetError("the features of all training images are the same: no distance can be measured by them")
    shrunk: Floats = oas(centred, assume_centered=True)[0]
    return shrunk


def _whitening(covariance: Floats) -> Features:
    """(d, d) W with W Wᵀ the inverse of the covariance: its inverted Cholesky factor, transposed."""
    from scipy.linalg import solve_triangular  # actors, which never fit, start sooner without SciPy

    # A floor of a millionth of the mean variance, for numbers that never vary where hardly anything was shrunk.
    floor = 1e-6 * float(np.trace(covariance)) / len(covariance)
    factor = np.linalg.cholesky(covariance + floor * np.eye(len(covariance)))
    inverse = solve_triangular(factor, np.eye(len(covariance)), lower=True)
    return np.ascontiguousarray(inverse.T, dtype=np.float32)


def _check_features(features: ArrayLike) -> Features:
    rows = np.asarray(features, dtype=np.float32)
    if rows.ndim != 2 or not rows.shape[1]:
        raise DatasetError(f"features have shape {rows.shape}: allowed is (n, d), one row an image")
    bad = np.asarray(~np.isfinite(rows).all(axis=1))
    if bad.any():
        raise DatasetError(
            f"features of row {int(np.argmax(bad))} are not finite ({bad.sum()} of {len(rows)} rows cannot be used)"
        )
    return rows
