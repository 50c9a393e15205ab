"""How sure a number is: intervals by bootstrap over patients, and Wilson's for one patient's share.

The cells of one patient share blood, stain and microscope and are not independent, so whole patients are
drawn with replacement (Rutter 2000, Bootstrap estimation of diagnostic accuracy with patient-clustered data).
`label`, `score` and `threshold` are as in `statistics.metrics`; `patient` is (n,) of patient ids.

The resamples give the standard error, and the interval is a t interval on the logit of the metric (the log
for log loss), so it stays in the metric's range and is skewed as rates near 0 and 1 are. Its degrees of freedom are
few where few patients have most of the errors (`_degrees_of_freedom`). The percentiles of the resamples, the usual
choice, are too narrow for few patients and lie too high for a high rate. Share of nominal 95 % intervals that held the
true sensitivity, in 1,000 simulated sets (`parasitized_cells` in tests/statistics/test_intervals.py), 300 resamples:

    patients  mean cells  sensitivity  correlation in a patient  here    percentiles
    10        60          0.90         0.05                      94.8 %  87.4 %
    20        60          0.90         0.05                      94.7 %  91.2 %
    40        60          0.90         0.05                      95.4 %  92.6 %
    40        60          0.97         0.10                      95.1 %  87.5 %
    40        100         0.99         0.02                      95.1 %  91.4 %
    150       140         0.97         0.10                      94.2 %  92.2 %
    40        60          0.993        0.30                      83.8 %  63.9 %

In 2,000 simulated screenings of 40 patients (`screening` in the same file) all metrics were covered by 93.4 to 96.1 %,
but sensitivity at a specificity of 0.999, which hangs on one or two of some 1,400 uninfected cells, by 90 %; with 26
patients the area under the ROC curve by 92.5 %. The nearer the area is to 1, the fewer pairs of cells decide it: of
models of 0.993 intervals and paired ones of 40 patients held it in 92 to 93 %, of 0.998 in 90 to 91 % (600 to 1,000
simulated sets); paired ones of the other metrics covered 94 to 98 %. Where few patients have nearly all errors (the
last row), no resample holds a kind of patient that the sample has missed.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit, ndtri, stdtrit

from malaria_ray.errors import ConfigError, DatasetError
from malaria_ray.schema import Label
from malaria_ray.statistics.metrics import (
    COUNTS,
    Floats,
    Integers,
    cell_metrics,
    check_cells,
    check_lengths,
    tabulate,
    weighted_metrics,
)

Interval = tuple[float, float]
"""Lower and upper end; both NaN where there is no interval."""

MAX_UNDEFINED = 0.05
"""Largest share of resamples in which a metric may be undefined, a class not being drawn, say."""

ROUNDING = 1e-12
"""A standard error up to this is what rounding leaves of resamples that all agree."""

_NO_INTERVAL: Interval = (np.nan, np.nan)
_CLASS_OF = {
    "sensitivity": Label.parasitized,
    "specificity": Label.uninfected,
    "recall_uninfected": Label.uninfected,
}


def bootstrap_over_patients(
    label: ArrayLike,
    score: ArrayLike,
    patient: ArrayLike,
    *,
    threshold: float,
    seed: int,
    n_resamples: int = 1000,
    confidence: float = 0.95,
) -> dict[str, Interval]:
    """Interval of each metric of `metrics.cell_metrics`, in the metric's unit; does not depend on row order.

    Resample r is drawn from the sorted patients by `default_rng([seed, r])`. Both ends are NaN where no
    honest interval can be had: for counts; with fewer than two patients (of its class for sensitivity and
    specificity, of each class that occurs for the rest); where any cell has no patient; where the metric is
    undefined for these cells or for more than 5 % of the resamples; and where it is the same in all, as a
    sensitivity of 1 is.

    The interval of `expected_calibration_error` is for that error as estimated from so many cells, which is
    too large: in bins with few cells chance looks like bad calibration.

    On one core 1,000 resamples take about 1 s for 30,000 cells, 30 to 45 s and 120 MB for a million.

    Raises DatasetError for bad labels, scores or lengths, ConfigError for a flag out of range.
    """
    labels, scores = check_cells(label, score)
    codes, patients = patient_codes(patient)
    check_lengths(label=len(labels), patient=len(codes))
    _check_flags(n_resamples, confidence)
    values = cell_metrics(labels, scores, threshold=threshold)
    if np.any(codes < 0):
        return dict.fromkeys(values, _NO_INTERVAL)
    cells = tabulate(labels, scores, codes, threshold)
    resampled = weighted_metrics(cells, _resamples(len(patients), n_resamples, seed))
    half_widths = _half_widths(resampled, labels, codes, confidence, seed)
    return {name: _in_range(name, value, half_widths[name]) for name, value in values.items()}


def paired_bootstrap_over_patients(
    label: ArrayLike,
    score: ArrayLike,
    other_score: ArrayLike,
    patient: ArrayLike,
    *,
    threshold: float,
    other_threshold: float,
    seed: int,
    n_resamples: int = 1000,
    confidence: float = 0.95,
) -> dict[str, Interval]:
    """Interval of each metric of `score` minus that of `other_score`, from two models on the same cells.

    Both models see the same resamples, so what makes a patient hard for both cancels out. The interval is a
    plain t interval. NaN as in `bootstrap_over_patients`, so also where the difference is the same in all
    resamples. Raises as that does.
    """
    labels, scores = check_cells(label, score)
    _, other_scores = check_cells(label, other_score)
    codes, patients = patient_codes(patient)
    check_lengths(label=len(labels), patient=len(codes))
    _check_flags(n_resamples, confidence)
    values = cell_metrics(labels, scores, threshold=threshold)
    other_values = cell_metrics(labels, other_scores, threshold=other_threshold)
    differences = {name: value - other_values[name] for name, value in values.items()}
    if np.any(codes < 0):
        return dict.fromkeys(differences, _NO_INTERVAL)
    cells = tabulate(labels, scores, codes, threshold)
    other_cells = tabulate(labels, other_scores, codes, other_threshold)
    resampled = weighted_metrics(cells, _resamples(len(patients), n_resamples, seed))
    other_resampled = weighted_metrics(other_cells, _resamples(len(patients), n_resamples, seed))
    resampled_differences = {name: resampled[name] - other_resampled[name] for name in resampled}
    half_widths = _half_widths(resampled_differences, labels, codes, confidence, seed)
    return {
        name: (difference - half_widths[name], difference + half_widths[name])
        for name, difference in differences.items()
    }


def wilson(k: ArrayLike, n: ArrayLike, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Lower and upper ends of Wilson's interval for the share k / n, float64 in 0..1, k and n broadcast.

    k, n are counts, 0 <= k <= n; n = 0 gives NaN. The trials are taken to be independent. Wilson 1927,
    Probable inference, the law of succession, and statistical inference; without continuity correction.

    Raises DatasetError for counts out of range, ConfigError for a confidence outside 0..1.
    """
    _check_confidence(confidence)
    hits, trials = np.broadcast_arrays(np.asarray(k, dtype=np.float64), np.asarray(n, dtype=np.float64))
    bad = ~((hits >= 0) & (hits <= trials))
    if bad.any():
        raise DatasetError(f"k is {hits[bad][0]:g} of n {trials[bad][0]:g}: allowed is 0 <= k <= n")
    z = float(ndtri((1 + confidence) / 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = hits / trials
        center = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
        half = z / (1 + z**2 / trials) * np.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    # The ends are exactly 0 without hits and 1 with nothing but hits; rounding would miss them by 1e-17.
    low = np.where((hits == 0) & (trials > 0), 0.0, center - half)
    high = np.where((hits == trials) & (trials > 0), 1.0, center + half)
    return low, high


def patient_codes(patient: ArrayLike) -> tuple[Integers, NDArray[np.object_]]:
    """(n,) int64, the rank of each cell's patient among the sorted ids, -1 for null; (p,) the sorted ids."""
    codes, ids = pd.factorize(pd.Series(patient, dtype=object), sort=True)
    return codes.astype(np.int64), np.asarray(ids, dtype=object)


def _check_flags(n_resamples: int, confidence: float) -> None:
    _check_confidence(confidence)
    if n_resamples < 2:
        raise ConfigError(f"n_resamples is {n_resamples}: allowed is 2 or more, and 1000 is usual")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence}: allowed is between 0 and 1, 0.95 for a 95 % interval")


def _resamples(n_patients: int, n_resamples: int, seed: int) -> Iterator[Integers]:
    """How often each patient stands in each resample: n_resamples arrays of (n_patients,) int64."""
    for resample in range(n_resamples):
        drawn = np.random.default_rng([seed, resample]).integers(n_patients, size=n_patients)
        yield np.bincount(drawn, minlength=n_patients)


def _half_widths(
    resampled: dict[str, Floats], label: Integers, patient: Integers, confidence: float, seed: int
) -> dict[str, float]:
    """Half the width of the t interval of each metric; NaN where there is none.

    The degrees of freedom are at most one less than the patients that a metric is learnt from: those with cells of
    its class, else of the class that fewer patients have.
    """
    n_patients = {int(value): len(np.unique(patient[label == value])) for value in np.unique(label)}
    fewest = min(n_patients.values())
    influences = _influences(resampled, int(patient.max()) + 1, seed)
    half_widths = dict.fromkeys(resampled, np.nan)
    for name, values in resampled.items():
        n = n_patients.get(_CLASS_OF[name], fewest) if name in _CLASS_OF else fewest
        if n >= 2 and name not in COUNTS:
            degrees = min(n - 1, _degrees_of_freedom(influences[name]))
            half_widths[name] = float(stdtrit(degrees, (1 + confidence) / 2)) * _standard_error(values, n)
    return half_widths


def _influences(resampled: dict[str, Floats], n_patients: int, seed: int) -> dict[str, Floats]:
    """How far each patient moves each metric, (p,): the covariance, over the resamples, of the metric with how often
    the patient was drawn (Efron 2014, Estimation and accuracy after model selection, eq. 3.3).
    """
    values = np.array(list(resampled.values()))
    is_defined = ~np.isnan(values)
    means = np.sum(values, axis=1, where=is_defined, keepdims=True) / np.maximum(1, is_defined.sum(1, keepdims=True))
    deviations = np.where(is_defined, values - means, 0.0)
    sums = np.zeros((len(values), n_patients))
    for deviation, drawn in zip(deviations.T, _resamples(n_patients, values.shape[1], seed), strict=True):
        sums += np.outer(deviation, drawn)
    return dict(zip(resampled, sums / values.shape[1], strict=True))


def _degrees_of_freedom(influence: Floats) -> float:
    """Of a variance that is a sum of squares: few where few patients carry most of it (after Satterthwaite 1946).

    Two thirds of the patients where influences are normal; 2 where one patient decides, and where none does.
    """
    squares = influence**2
    fourth = float(np.sum(squares**2))
    return 2 * float(np.sum(squares)) ** 2 / fourth if fourth > 0 else 2.0


def _standard_error(resampled: Floats, n_patients: int) -> float:
    """Standard deviation over the resamples; NaN where too many are undefined, or none differs from another.

    Of n patients drawn with replacement it is too small by √((n - 1) / n) (Hesterberg 2015, What teachers
    should know about the bootstrap), which the factor undoes.
    """
    defined = resampled[~np.isnan(resampled)]
    if len(defined) < (1 - MAX_UNDEFINED) * len(resampled):
        return np.nan
    error = float(np.std(defined, ddof=1))
    return error * float(np.sqrt(n_patients / (n_patients - 1))) if error > ROUNDING else np.nan


def _in_range(name: str, value: float, half_width: float) -> Interval:
    """value ± half_width, taken on the logarithmic scale of the metric (delta method) and brought back."""
    if name == "log_loss":
        factor = np.exp(half_width / value)
        return float(value / factor), float(value * factor)
    low, high = (-1, 1) if name == "matthews_correlation" else (0, 1)
    share = (value - low) / (high - low)
    if not 0 < share < 1:
        return _NO_INTERVAL
    half = half_width / (high - low) / (share * (1 - share))
    ends = low + (high - low) * expit(logit(share) + np.array([-half, half]))
    return float(ends[0]), float(ends[1])
