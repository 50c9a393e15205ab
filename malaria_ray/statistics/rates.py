"""A model's rates of error per cell, and how far they differ between patients.

A false-positive rate of 2 % on average is 0.5 % in one patient and 6 % in the next, by stain, microscope and blood.
What a patient's parasitized fraction must stand out from is therefore not the average of uninfected patients but the
highest that they show (Delahunt et al. 2024, Metrics to guide development of machine learning algorithms for malaria
diagnosis, Frontiers in Malaria 2:1250220).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaln, expit
from scipy.stats import beta as beta_distribution

from malaria_ray.errors import ConfigError, DatasetError
from malaria_ray.schema import Label
from malaria_ray.statistics.intervals import patient_codes
from malaria_ray.statistics.metrics import Floats, called_parasitized, check_cells, check_lengths

_N_GRID = (61, 41)
_LOGIT_MEAN, _LOGIT_CORRELATION = (-12.0, 12.0), (-9.0, 3.0)


@dataclass(frozen=True, kw_only=True)
class PatientRate:
    """What is known of the rate of a patient who was not among those it was learnt from: Beta(alpha, beta).

    n_errors of n_cells cells of n_patients patients were wrong. The beta distribution has the spread between
    patients in it and what so few patients and cells leave unknown of that spread and of the mean.
    """

    alpha: float
    beta: float
    n_errors: int
    n_cells: int
    n_patients: int

    @property
    def mean(self) -> float:
        return self.alpha / (self.alpha + self.beta)

    @property
    def sd(self) -> float:
        """Standard deviation between new patients."""
        return float(np.sqrt(self.mean * (1 - self.mean) / (self.alpha + self.beta + 1)))

    def quantile(self, share: ArrayLike) -> Floats:
        """The rate that this share (0..1) of new patients does not exceed, float64 in 0..1."""
        found: Floats = beta_distribution.ppf(share, self.alpha, self.beta)
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ErrorRates:
        rates = {name: PatientRate(**values[name]) for name in ("false_positive", "false_negative")}
        return cls(threshold=values["threshold"], **rates)


def fit_rate(n_errors: ArrayLike, n_cells: ArrayLike) -> PatientRate:
    """The rate of a new patient, from the (p,) counts of errors and cells of p patients; patients without cells are
    left out.

    Beta-binomial: each patient has a rate of its own, beta distributed with a mean and a correlation of the cells
    within a patient (Kleinman 1973). Both are integrated out over a grid under the priors Beta(0.5, 0.5) (Jeffreys')
    and Beta(0.5, 4.5) (a correlation of 0.1, give or take 0.12), and the predictive distribution's mean and variance
    make the beta distribution that is returned. In simulations of 20 to 150 patients 95 to 99 % of new patients lay
    below its 95 % quantile, of 3 to 8 patients 96 to 99.9 %: from few patients it is wide, as it should be, and one
    patient is enough to get it.

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
    mean, variance = _predicted(counts[0], counts[1], times)
    size = mean * (1 - mean) / variance - 1
    return PatientRate(
        alpha=mean * size,
        beta=(1 - mean) * size,
        n_errors=int(errors.sum()),
        n_cells=int(cells.sum()),
        n_patients=len(cells),
    )


def fit_error_rates(
    patient_id: ArrayLike,
    label: ArrayLike,
    score: ArrayLike,
    *,
    threshold: float,
    uninfected_patients_only: bool = False,
) -> ErrorRates:
    """Rates of error from labelled cells that the model has not learnt from (the validation split).

    patient_id  (n,) of strings; cells without one (null) are left out
    label, score, threshold  as in `statistics.metrics`
    uninfected_patients_only  learn the false-positive rate from patients without any parasitized cell, as Delahunt
        et al. do, and not from the uninfected cells of all; there are few such patients, and wrong labels are in the
        cells of the others

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
    if uninfected_patients_only:
        uninfected = uninfected & (per_patient(parasitized)[codes] == 0) if len(ids) else uninfected
    for cells, name in ((uninfected, "uninfected"), (parasitized, "parasitized")):
        if not np.any(cells & is_known):
            of = "uninfected patient" if uninfected_patients_only and name == "uninfected" else "patient"
            raise DatasetError(
                f"no {name} validation cell of a known {of}: the model's rates of error cannot be learnt, so no "
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


def _predicted(errors: np.ndarray, cells: np.ndarray, times: np.ndarray) -> tuple[float, float]:
    """Mean and variance of a new patient's rate, integrated over a grid that is drawn anew around its mass."""
    spans = [_LOGIT_MEAN, _LOGIT_CORRELATION]
    for _ in range(3):
        axes = [np.linspace(*span, n) for span, n in zip(spans, _N_GRID, strict=True)]
        x, y = np.meshgrid(*axes, indexing="ij")
        mean, correlation = expit(x), expit(y)
        size = (1 - correlation) / correlation
        a, b = mean * size, (1 - mean) * size
        log_weight = 0.5 * np.log(mean * (1 - mean)) + 0.5 * np.log(correlation) + 4.5 * np.log1p(-correlation)
        for k, n, t in zip(errors.tolist(), cells.tolist(), times.tolist(), strict=True):
            log_weight += t * (betaln(a + k, b + n - k) - betaln(a, b))
        weight = np.exp(log_weight - log_weight.max())
        weight /= weight.sum()
        spans = [
            _around(axis, weight.sum(axis=1 - i), whole)
            for i, (axis, whole) in enumerate(zip(axes, (_LOGIT_MEAN, _LOGIT_CORRELATION), strict=True))
        ]
    centre = float((weight * mean).sum())
    spread = mean * (1 - mean) * correlation + (mean - centre) ** 2
    return centre, float((weight * spread).sum())


def _around(axis: Floats, weight: Floats, whole: tuple[float, float]) -> tuple[float, float]:
    """The span in which all but a millionth of the weight lies, with a step to spare."""
    inside = axis[weight > 1e-6 * weight.max()]
    step = axis[1] - axis[0]
    return max(whole[0], float(inside[0] - step)), min(whole[1], float(inside[-1] + step))
