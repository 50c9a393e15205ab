"""Scores that mean what they say, and the threshold for a wanted specificity; both from validation cells alone.

`label` and `score` are as in `statistics.metrics`. Nothing here asks which split the cells are of: `fit` must be
given those of the validation split and no others, because a threshold chosen on test cells flatters the test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from malaria_ray.errors import ConfigError, DatasetError
from malaria_ray.schema import Label
from malaria_ray.statistics.metrics import Floats, check_cells, check_scores

CLIP = 2.0**-24
"""Scores are taken to be this far from 0 and 1: the resolution of float32 below 1, where sigmoids end up."""

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
"""Outside, a likelihood is flat and a temperature means no more than 'all too timid' or 'worth nothing'."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the validation cells say about a model's scores; stored with the run.

    temperature  divides the logit of a score; above 1 for a model that is too sure of itself
    threshold    of the score as the model gives it, not of the calibrated one
    specificity  wanted of the threshold, in 0..1; None where the threshold was given
    n            validation cells
    n_patients   patients they are of; cells without a patient are counted as none
    """

    temperature: float
    threshold: float
    specificity: float | None
    n: int
    n_patients: int

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold is {self.threshold}: allowed is 0..1")


def fit(label: ArrayLike, score: ArrayLike, patient_id: ArrayLike, *, specificity: float | None = None) -> Calibration:
    """Calibration from validation cells; without a wanted `specificity` the threshold is 0.5.

    patient_id  (n,) of strings or null
    Raises as `fit_temperature` and `threshold_for_specificity` do.
    """
    temperature = fit_temperature(label, score)
    threshold = 0.5 if specificity is None else threshold_for_specificity(label, score, specificity)
    patients = pd.Series(patient_id, dtype=object)
    return Calibration(
        temperature=temperature,
        threshold=threshold,
        specificity=specificity,
        n=len(patients),
        n_patients=int(patients.nunique()),
    )


def fit_temperature(label: ArrayLike, score: ArrayLike) -> float:
    """The temperature that gives the cells' labels the highest likelihood, in 0.05..20.

    Guo et al. 2017, On calibration of modern neural networks, section 4.2, for one logit. The likelihood is
    concave in 1 / temperature, so its maximum is the one root of its slope. Where no cell lies on the wrong side of
    0.5 it has no maximum, and these cells cannot say how sure to be: 1, which leaves scores as they are.

    Raises DatasetError for bad labels or scores, and where a class has no cells.
    """
    from scipy.optimize import brentq  # actors, which never fit, start sooner without SciPy

    labels, scores = check_cells(label, score)
    for wanted in Label:
        if not np.any(labels == wanted):
            raise DatasetError(
                f"none of the {len(labels)} validation cells is {wanted.name}: a temperature needs both classes; "
                "validate on patients of both"
            )
    logit_of_cell = logits(scores)
    if np.all(logit_of_cell * (2 * labels - 1) >= 0):
        return 1.0

    def slope(log_temperature: float) -> float:
        return float(np.mean((labels - _sigmoid(logit_of_cell * math.exp(-log_temperature))) * logit_of_cell))

    coldest, hottest = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    if slope(coldest) >= 0:
        return MIN_TEMPERATURE
    if slope(hottest) <= 0:
        return MAX_TEMPERATURE
    return math.exp(brentq(slope, coldest, hottest, xtol=1e-9))


def calibrate(score: ArrayLike, temperature: float) -> NDArray[np.floating[Any]]:
    """(n,) calibrated scores in 0..1, in the scores' own type: sigmoid(logit(score) / temperature).

    No two cells change places and 0.5 stays 0.5. Scores nearer than 2⁻²⁴ to 0 or 1 count as that near; at a
    temperature below 1 some near there become equal, so that a ranking metric may change where both classes have such.
    Temperature 1 returns the scores themselves.

    Raises DatasetError for bad scores, ConfigError for a temperature that is not a positive number.
    """
    scores = check_scores(score)
    _check_temperature(temperature)
    return scores if temperature == 1 else _sigmoid(logits(scores) / temperature).astype(scores.dtype)


def threshold_for_specificity(label: ArrayLike, score: ArrayLike, specificity: float) -> float:
    """The lowest threshold at which a further uninfected cell is called parasitized with a chance of at most
    1 - specificity, if it is drawn as the uninfected cells given were.

    It lies just above the ⌈(n + 1) · specificity⌉-th lowest of the n uninfected scores (a split conformal quantile:
    Vovk et al. 2005, Algorithmic learning in a random world; the order statistic of Tong et al. 2018, Neyman-Pearson
    classification). So it is a little stricter than the specificity of these n cells asks for, as few cells know
    little of a tail; cells of equal score are never split; and n must be specificity / (1 - specificity) or more: 99
    for 0.99, 999 for 0.999. Parasitized cells are not looked at.

    Cells of one patient are alike and new patients are not these: expect a spread between patients
    (`statistics.patients`).

    Raises DatasetError for bad labels or scores, for too few uninfected cells, and where too many of them have a
    score of 1; ConfigError for a specificity that is not between 0 and 1.
    """
    labels, scores = check_cells(label, score)
    uninfected = np.sort(scores[labels == Label.uninfected])
    n = len(uninfected)
    check_specificity(specificity, n)
    highest_negative = uninfected[_rank(n, specificity) - 1]
    if highest_negative >= 1 - CLIP:
        raise DatasetError(
            f"{np.sum(uninfected >= 1 - CLIP)} of {n} uninfected validation cells have a score of 1: no threshold "
            f"gives a specificity of {specificity:g}; lower it or train a better model"
        )
    return float(np.nextafter(highest_negative, highest_negative.dtype.type(1)))


def check_specificity(specificity: float, n_uninfected: int) -> None:
    """Raises what `threshold_for_specificity` would for so many uninfected cells; to be asked before training.

    ConfigError for a specificity that is not between 0 and 1, DatasetError for too few cells.
    """
    if not 0 < specificity < 1:
        raise ConfigError(f"specificity is {specificity}: allowed is between 0 and 1, 0.99 say")
    if _rank(n_uninfected, specificity) > n_uninfected:
        needed = math.ceil(specificity / (1 - specificity) - 1e-9)
        raise DatasetError(
            f"{n_uninfected} uninfected validation cells cannot carry a specificity of {specificity:g}: it takes "
            f"{needed:,} or more; lower it or validate on more cells"
        )


def _rank(n: int, specificity: float) -> int:
    return math.ceil((n + 1) * specificity - 1e-9)  # 1,000 × 0.9 must not become 901 by rounding


def logits(score: NDArray[np.floating[Any]]) -> Floats:
    """(n,) float64, ln(score / (1 - score)) of checked scores, no farther from 0 than 16.6 (`CLIP`)."""
    clipped = np.clip(score.astype(np.float64), CLIP, 1 - CLIP)
    found: Floats = np.log(clipped / (1 - clipped))
    return found


def _sigmoid(logit: Floats) -> Floats:
    found: Floats = 1 / (1 + np.exp(-logit))
    return found


def _check_temperature(temperature: float) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(f"temperature is {temperature}: allowed are numbers above 0")
