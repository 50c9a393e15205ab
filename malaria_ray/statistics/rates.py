"""A model's rates of error per cell, and how far they differ between patients.

A false-positive rate of 2 % on average is 0.5 % in one patient and 6 % in the next, by stain, microscope and blood.
What a patient's parasitized fraction must stand out from is therefore not the average of uninfected patients but the
highest that they show (Delahunt et al. 2024, Metrics to guide development of machine learning algorithms for malaria
diagnosis, Frontiers in Malaria 2:1250220).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betainc, betaln, expit, logit, ndtr, ndtri

from malaria_ray.errors import ConfigError, DatasetError
from malaria_ray.schema import Label
from malaria_ray.statistics.intervals import patient_codes
from malaria_ray.statistics.metrics import Floats, called_parasitized, check_cells, check_lengths

SPREAD = 1.5
"""Scale of the prior of the spread between patients, on the logit: rates that differ 4.5-fold are nothing odd."""

_NORMAL_SCORES = np.linspace(-3.5, 3.5, 71)
SHARES: Floats = ndtr(_NORMAL_SCORES)
"""Shares of patients, 0.0002 to 0.9998, whose quantiles a `PatientRate` holds."""

_LOGIT_OF_RATE = np.linspace(-18, 18, 217)  # 1.5e-8 to 1 - 1.5e-8
_N_GRID = (41, 25)
_LOGIT_OF_MEAN, _LOG_OF_SPREAD = (-14.0, 14.0), (np.log(0.03), np.log(6.0))


@dataclass(frozen=True, kw_only=True)
class PatientRate:
    """What is known of the rate of a patient who was not among those it was learnt from.

    n_errors of n_cells cells of n_patients patients were wrong. `quantiles` are the rates that each of `SHARES` of new
    patients do not exceed, in 0..1: the spread between patients is in them, and what so few patients and cells leave
    unknown of that spread and of the mean.
    """

    quantiles: tuple[float, ...]
    n_errors: int
    n_cells: int
    n_patients: int

    @property
    def mean(self) -> float:
        """Share of all cells, half an error and half a right cell added (Jeffreys): 0..1, ends excluded."""
        return (self.n_errors + 0.5) / (self.n_cells + 1)

    def quantile(self, share: ArrayLike) -> Floats:
        """The rate that this share (0..1) of new patients does not exceed, float64 in 0..1."""
        scores = ndtri(np.asarray(share, dtype=np.float64))
        found: Floats = expit(np.interp(scores, _NORMAL_SCORES, logit(np.array(self.quantiles))))
        return found


@dataclass(frozen=True, kw_only=True)
class ErrorRates:
    """Rates of error of a model at one `threshold`; stored with the run, learnt from its validation cells.

    false_positive  of uninfected cells, called parasitized
    false_negative  of parasitized cells, not called so
    """

    false_positive: PatientRate
    false_negative: PatientRate
    threshold: float

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ErrorRates:
        def rate(name: str) -> PatientRate:
            return PatientRate(**values[name] | {"quantiles": tuple(values[name]["quantiles"])})

        return cls(
            threshold=values["threshold"],
            false_positive=rate("false_positive"),
            false_negative=rate("false_negative"),
        )


def fit_rate(n_errors: ArrayLike, n_cells: ArrayLike) -> PatientRate:
    """The rate of a new patient, from the (p,) counts of errors and cells of p patients; patients without cells are
    left out.

    Beta-binomial: each patient has a rate of its own, beta distributed (Kleinman 1973, Proportions with extraneous
    variance). Its mean and spread are integrated out over a grid, under Jeffreys' prior for the mean and a half-normal
    one of scale `SPREAD` for the spread on the logit, √(1 / min(alpha, beta)) (as of random effects: Gelman 2006). In
    simulations 91 to 97 % of new patients lay below the 95 % quantile, from 5 to 100 patients with mean rates of 0.05
    to 6 %. From few patients it is wide, as it should be, and from one it says next to nothing.

    Raises DatasetError for no patients with cells, or counts out of range.
    """
    errors, cells = np.broadcast_arrays(np.asarray(n_errors, dtype=np.int64), np.asarray(n_cells, dtype=np.int64))
    bad = (errors < 0) | (errors > cells)
    if bad.any():
        raise DatasetError(f"{errors[bad][0]} errors of {cells[bad][0]} cells: allowed are 0 to all of them")
    errors, cells = errors[cells > 0], cells[cells > 0]
    if not len(cells):
        raise DatasetError("no patient with cells: there must be at least one to learn a rate of error from")
    counts, times = np.unique(np.stack([errors, cells]), axis=1, return_counts=True)
    quantiles = _predicted(counts[0], counts[1], times)
    return PatientRate(
        quantiles=tuple(quantiles.tolist()),
        n_errors=int(errors.sum()),
        n_cells=int(cells.sum()),
        n_patients=len(cells),
    )


def fit_error_rates(patient_id: ArrayLike, label: ArrayLike, score: ArrayLike, *, threshold: float) -> ErrorRates:
    """Rates of error from labelled cells that the model has not learnt from (the validation split).

    patient_id  (n,) of strings; cells without one (null) are left out
    label, score, threshold  as in `statistics.metrics`

    The false-positive rate is learnt from the uninfected cells of all patients, not only of those without any
    parasitized cell as Delahunt et al. do: of such there are few. Wrong labels are in the cells of the others.

    Raises DatasetError for bad columns, and where no cell of one class has a patient; ConfigError for a threshold
    outside 0..1.
    """
    labels, scores = check_cells(label, score)
    codes, ids = patient_codes(patient_id)
    check_lengths(patient_id=len(codes), label=len(labels))
    called = called_parasitized(scores, threshold)
    is_known = codes >= 0

    def per_patient(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(codes[chosen & is_known], minlength=len(ids))

    uninfected, parasitized = labels == Label.uninfected, labels == Label.parasitized
    for cells, name in ((uninfected, "uninfected"), (parasitized, "parasitized")):
        if not np.any(cells & is_known):
            raise DatasetError(
                f"no {name} validation cell of a known patient: the model's rates of error cannot be learnt, so no "
                "patient's fraction can be corrected; validate on cells of both classes with their patients"
            )
    return ErrorRates(
        false_positive=fit_rate(per_patient(uninfected & called), per_patient(uninfected)),
        false_negative=fit_rate(per_patient(parasitized & ~called), per_patient(parasitized)),
        threshold=threshold,
    )


def check_same_threshold(rates: ErrorRates, threshold: float) -> None:
    """ConfigError where cells are called at another threshold than the rates of error were learnt at."""
    if rates.threshold != threshold:
        raise ConfigError(
            f"threshold is {threshold} and the rates of error were learnt at {rates.threshold}: they say nothing of "
            "calls at another one"
        )


def _predicted(errors: np.ndarray, cells: np.ndarray, times: np.ndarray) -> Floats:
    """Quantiles of a new patient's rate at `SHARES`, integrated over a grid that is drawn anew around its mass."""
    wholes = (_LOGIT_OF_MEAN, _LOG_OF_SPREAD)
    spans: list[tuple[float, float]] = list(wholes)
    for _ in range(3):
        axes = [np.linspace(*span, n) for span, n in zip(spans, _N_GRID, strict=True)]
        logit_of_mean, log_of_spread = np.meshgrid(*axes, indexing="ij")
        mean, spread = expit(logit_of_mean), np.exp(log_of_spread)
        size = 1 / (spread**2 * np.minimum(mean, 1 - mean))
        a, b = mean * size, (1 - mean) * size
        log_weight = 0.5 * np.log(mean * (1 - mean)) + log_of_spread - 0.5 * (spread / SPREAD) ** 2
        for k, n, t in zip(errors.tolist(), cells.tolist(), times.tolist(), strict=True):
            log_weight += t * (betaln(a + k, b + n - k) - betaln(a, b))
        weight = np.exp(log_weight - log_weight.max())
        spans = [_around(axis, weight.sum(axis=1 - i), wholes[i]) for i, axis in enumerate(axes)]
    heavy = weight > 1e-4 * weight.max()
    below = weight[heavy] @ betainc(a[heavy][:, None], b[heavy][:, None], expit(_LOGIT_OF_RATE)) / weight[heavy].sum()
    found: Floats = expit(np.interp(SHARES, below, _LOGIT_OF_RATE))
    return found


def _around(axis: Floats, weight: Floats, whole: tuple[float, float]) -> tuple[float, float]:
    """The span in which all but a millionth of the weight lies, with a step to spare."""
    inside = axis[weight > 1e-6 * weight.max()]
    step = axis[1] - axis[0]
    return max(whole[0], float(inside[0] - step)), min(whole[1], float(inside[-1] + step))
