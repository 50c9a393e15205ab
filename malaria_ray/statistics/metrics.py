"""What the scores of cells are worth against their labels: numbers and curves, under scikit-learn's names.

Throughout the module n is the number of cells and
    label      (n,) of 0 uninfected or 1 parasitized, no nulls
    score      (n,) float32 or float64 in 0..1, P(parasitized), no NaN
    threshold  a cell is called parasitized where `score >= threshold`, compared in the scores' own type: a
               float32 score of 0.7 reaches a threshold of 0.7, as in the column `predicted_label`
NumPy arrays, pandas Series and lists are taken alike. What is undefined (a rate with nothing to divide by,
ROC AUC of one class) is NaN, where scikit-learn gives 0 and warns.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from malaria_ray.errors import ConfigError, DatasetError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

N_CALIBRATION_BINS = 15
"""As in Guo et al. 2017, section 2 and table 1."""

MAX_CURVE_POINTS = 1000

COUNTS = ("n_true_positive", "n_false_positive", "n_true_negative", "n_false_negative")

_FALSE_POSITIVES_PER_MILLE = {"sensitivity_at_specificity_0.99": 10, "sensitivity_at_specificity_0.999": 1}


def cell_metrics(label: ArrayLike, score: ArrayLike, *, threshold: float) -> dict[str, float]:
    """All metrics of one set of cells by name, parasitized being the positive class.

    Counts are in cells, rates in 0..1, Matthews correlation in -1..1, log loss in nats.
    `negative_predictive_value` and `specificity` stand also as `precision_uninfected` and
    `recall_uninfected`, their names in a classification report; `…_weighted` averages over the two classes by
    their numbers of labels.

    `log_loss` clips the scores to [eps, 1 - eps] of their type, as scikit-learn does.
    `expected_calibration_error` is Guo et al. 2017, On calibration of modern neural networks, eq. 3, over 15
    bins of equal width, applied to P(parasitized) and not to the confidence of the call (so Naeini et al.
    2015). `sensitivity_at_specificity_0.99` is the highest sensitivity of all thresholds whose specificity on
    these cells is 0.99 or more, without interpolation: with fewer than 100 uninfected cells, without a false
    positive.

    Raises DatasetError for bad labels or scores, ConfigError for a threshold outside 0..1.
    """
    labels, scores = check_cells(label, score)
    cells = tabulate(labels, scores, np.zeros(len(labels), dtype=np.int64), threshold)
    values = weighted_metrics(cells, [np.ones(1, dtype=np.int64)])
    return {name: float(value[0]) for name, value in values.items()}


def roc_curve(label: ArrayLike, score: ArrayLike) -> pd.DataFrame:
    """Columns threshold (falling, from infinity), false_positive_rate and sensitivity; at most 1,000 rows.

    Each row is an operating point of scikit-learn's `roc_curve`; a point that was left out lies at most 0.003
    from one that stands. No rows where a class has no cells. Raises DatasetError for bad labels or scores.
    """
    threshold, true_positives, false_positives = _operating_points(*check_cells(label, score))
    columns = ["threshold", "false_positive_rate", "sensitivity"]
    if true_positives[-1] == 0 or false_positives[-1] == 0:
        return pd.DataFrame(columns=columns, dtype=np.float64)
    sensitivity = true_positives / true_positives[-1]
    false_positive_rate = false_positives / false_positives[-1]
    rows = _evenly_along(false_positive_rate, sensitivity)
    return pd.DataFrame(np.column_stack([threshold, false_positive_rate, sensitivity])[rows], columns=columns)


def precision_recall_curve(label: ArrayLike, score: ArrayLike) -> pd.DataFrame:
    """Columns threshold (falling, from infinity), sensitivity (the recall) and precision; at most 1,000 rows.

    Each row is an operating point of scikit-learn's `precision_recall_curve`; the first, which calls nothing,
    has precision 1 by the same convention. Rows are left out evenly along the curve. No rows where no cell is
    parasitized. Raises DatasetError for bad labels or scores.
    """
    threshold, true_positives, false_positives = _operating_points(*check_cells(label, score))
    columns = ["threshold", "sensitivity", "precision"]
    if true_positives[-1] == 0:
        return pd.DataFrame(columns=columns, dtype=np.float64)
    sensitivity = true_positives / true_positives[-1]
    precision = np.ones_like(sensitivity)
    precision[1:] = true_positives[1:] / (true_positives[1:] + false_positives[1:])
    rows = _evenly_along(sensitivity, precision)
    return pd.DataFrame(np.column_stack([threshold, sensitivity, precision])[rows], columns=columns)


def calibration_curve(label: ArrayLike, score: ArrayLike, *, n_bins: int = N_CALIBRATION_BINS) -> pd.DataFrame:
    """Columns score_low, score_high, n, mean_score, observed_share; one row for each bin that has cells.

    The bins are of equal width and hold the scores in (score_low, score_high], the first also 0;
    `observed_share` is the share of the bin's n cells that are labelled parasitized. `mean_score` and
    `observed_share` are scikit-learn's `prob_pred` and `prob_true`. Raises DatasetError for bad labels or
    scores.
    """
    labels, scores = check_cells(label, score)
    bin_of_cell = _calibration_bin(scores, n_bins)
    n = np.bincount(bin_of_cell, minlength=n_bins)
    used = np.flatnonzero(n)
    edges = np.linspace(0, 1, n_bins + 1)
    return pd.DataFrame(
        {
            "score_low": edges[used],
            "score_high": edges[used + 1],
            "n": n[used],
            "mean_score": np.bincount(bin_of_cell, scores, n_bins)[used] / n[used],
            "observed_share": np.bincount(bin_of_cell, labels, n_bins)[used] / n[used],
        }
    )


def check_cells(label: ArrayLike, score: ArrayLike) -> tuple[Integers, NDArray[np.floating[Any]]]:
    """`label` as (n,) int64 and `score` as (n,) float32 where it was that, else float64.

    Raises DatasetError with the first bad row, counted from 0: lengths differ, no cells, a label that is null
    or neither 0 nor 1, a score that is null or outside 0..1.
    """
    scores = check_scores(score)
    labels = check_labels(label)
    check_lengths(label=len(labels), score=len(scores))
    return labels.astype(np.int64), scores


def check_labels(label: ArrayLike, *, nullable: bool = False) -> Floats:
    """`label` as (n,) float64 of 0, 1 and, where nullable, NaN; DatasetError names the first other."""
    labels = _numbers(label, "label")
    bad = ~np.isin(labels, (0, 1))
    if nullable:
        bad &= pd.Series(label).notna().to_numpy()
    otherwise = "or null" if nullable else "with unlabelled cells left out"
    _refuse(bad, label, "label", f"0 (uninfected) or 1 (parasitized), {otherwise}")
    return labels


def check_scores(score: ArrayLike) -> NDArray[np.floating[Any]]:
    """`score` as (n,) float32 where it was that, else float64. DatasetError for none, or one outside 0..1."""
    numbers = _numbers(score, "score")
    if not len(numbers):
        raise DatasetError("no cells: there must be at least one score to compute anything from")
    _refuse(~((numbers >= 0) & (numbers <= 1)), score, "score", "0..1, no nulls")
    return numbers.astype(np.float32) if np.asarray(score).dtype == np.float32 else numbers


def check_lengths(**n_rows: int) -> None:
    """DatasetError where columns that describe the same cells have different numbers of rows."""
    if len(set(n_rows.values())) > 1:
        found = ", ".join(f"{n} rows of {name}" for name, n in n_rows.items())
        raise DatasetError(f"{found}: the columns must describe the same cells, row by row")


def called_parasitized(score: NDArray[np.floating[Any]], threshold: float) -> NDArray[np.bool_]:
    """(n,) bool, `score >= threshold` in the scores' own type. ConfigError for a threshold outside 0..1."""
    if not 0 <= threshold <= 1:
        raise ConfigError(f"threshold is {threshold}: allowed is 0..1")
    return score >= score.dtype.type(threshold)


@dataclass(frozen=True)
class ScoredCells:
    """Cells from the highest score to the lowest, summed so that metrics under new patient weights cost O(n).

    n cells, p patients, g distinct scores.
        label          (n,) int64, 0 or 1
        patient        (n,) int64, 0..p-1
        last_of_score  (g,) int64, the last cell of each distinct score; equal scores are never told apart
        sums           (p, 6 + 15) float64, for each patient: true negatives, false positives, false
                       negatives, true positives, squared error, log loss, and in each calibration bin the
                       score minus the label
    """

    label: Integers
    patient: Integers
    last_of_score: Integers
    sums: Floats


def tabulate(label: Integers, score: NDArray[np.floating[Any]], patient: Integers, threshold: float) -> ScoredCells:
    """The table that `weighted_metrics` needs, from cells that `check_cells` passed.

    `patient` is (n,) int64 with each of 0..p-1. The rows are put into one order first, so that not even the
    last bit of a sum depends on the order given. Raises ConfigError for a threshold outside 0..1.
    """
    order = np.lexsort((label, patient, -score))
    label, score, patient = label[order], score[order], patient[order]
    return ScoredCells(label, patient, _last_of_score(score), _sums_by_patient(label, score, patient, threshold))


def weighted_metrics(cells: ScoredCells, weights: Iterable[Integers]) -> dict[str, Floats]:
    """Each metric of `cell_metrics` as (r,) float64, with patient i counted `weight[i]` times.

    weights  r arrays of (p,) int64, 0 or more, not all 0; taken one at a time, so r × p is never in memory
    """
    sums: list[Floats] = []
    ranks: list[Floats] = []
    for weight in weights:
        sums.append(weight @ cells.sums)
        ranks.append(_rank_sums(cells, weight))
    return _metrics_of_sums(np.array(sums)) | _metrics_of_ranks(np.array(ranks))


def _numbers(values: ArrayLike, name: str) -> Floats:
    """(n,) float64, NaN for nulls of any kind and what is no number. DatasetError unless one-dimensional."""
    shape = np.shape(values)
    if len(shape) != 1:
        raise DatasetError(f"{name} has shape {shape}: allowed is one dimension, (n,)")
    numbers = pd.to_numeric(pd.Series(values), errors="coerce")
    return numbers.to_numpy(dtype=np.float64, na_value=np.nan)


def _refuse(bad: NDArray[np.bool_], found: ArrayLike, name: str, allowed: str) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise DatasetError(
            f"{name} of row {row} is {pd.Series(found).iloc[row]} "
            f"({bad.sum()} of {len(bad)} rows cannot be used): allowed is {allowed}"
        )


def _last_of_score(descending: NDArray[np.floating[Any]]) -> Integers:
    return np.append(np.flatnonzero(np.diff(descending)), len(descending) - 1).astype(np.int64)


def _operating_points(label: Integers, score: NDArray[np.floating[Any]]) -> tuple[Floats, Integers, Integers]:
    """(g + 1,) thresholds, true and false positives: one that calls nothing, then each distinct score."""
    order = np.argsort(-score, kind="stable")
    last = _last_of_score(score[order])
    true_positives = np.append(0, np.cumsum(label[order])[last])
    threshold = np.append(np.inf, score[order][last].astype(np.float64))
    return threshold, true_positives, np.append(0, last + 1) - true_positives


def _evenly_along(x: Floats, y: Floats) -> Integers:
    """Indices of at most MAX_CURVE_POINTS points of a curve, with both ends and evenly along its length."""
    if len(x) <= MAX_CURVE_POINTS:
        return np.arange(len(x))
    length = np.append(0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
    piece = np.ceil(length / length[-1] * (MAX_CURVE_POINTS - 2))
    return np.union1d(0, np.flatnonzero(np.diff(piece, append=np.inf)))


def _calibration_bin(score: NDArray[np.floating[Any]], n_bins: int) -> Integers:
    return np.searchsorted(np.linspace(0, 1, n_bins + 1)[1:-1], score.astype(np.float64)).astype(np.int64)


def _sums_by_patient(label: Integers, score: NDArray[np.floating[Any]], patient: Integers, threshold: float) -> Floats:
    n_patients = int(patient.max()) + 1
    outcome = 4 * patient + 2 * label + called_parasitized(score, threshold)
    outcomes = np.bincount(outcome, minlength=4 * n_patients).reshape(n_patients, 4)
    probability = score.astype(np.float64)
    squared_error = np.bincount(patient, (probability - label) ** 2)
    eps = float(np.finfo(score.dtype).eps)
    clipped = np.clip(probability, eps, 1 - eps)
    log_loss = np.bincount(patient, -np.log(np.where(label == 1, clipped, 1 - clipped)))
    bin_of_cell = N_CALIBRATION_BINS * patient + _calibration_bin(score, N_CALIBRATION_BINS)
    gaps = np.bincount(bin_of_cell, probability - label, N_CALIBRATION_BINS * n_patients)
    return np.column_stack([outcomes, squared_error, log_loss, gaps.reshape(n_patients, N_CALIBRATION_BINS)])


def _rank_sums(cells: ScoredCells, weight: Integers) -> Floats:
    """(6,): parasitized and uninfected cells; twice the area under the ROC curve, in pairs of cells; the area
    under the precision-recall curve, in cells; the true positives at each of the two specificities."""
    weights = weight[cells.patient]
    called = np.cumsum(weights)[cells.last_of_score]
    true_positives = np.cumsum(weights * cells.label)[cells.last_of_score]
    false_positives = called - true_positives
    gained = np.diff(true_positives, prepend=0)
    twice_area = (2 * true_positives - gained) @ np.diff(false_positives, prepend=0)
    precision = np.divide(true_positives, called, out=np.zeros(len(called)), where=called > 0)
    n_uninfected = false_positives[-1]
    from_none = np.append(0, true_positives)
    at_specificity = [
        from_none[np.searchsorted(false_positives, n_uninfected * allowed // 1000, side="right")]
        for allowed in _FALSE_POSITIVES_PER_MILLE.values()
    ]
    return np.array([true_positives[-1], n_uninfected, twice_area, gained @ precision, *at_specificity], float)


def _metrics_of_sums(sums: Floats) -> dict[str, Floats]:
    """(r, 21) sums over patients → each metric that needs no order of the scores, (r,)."""
    tn, fp, fn, tp, squared_error, log_loss = sums[:, :6].T
    parasitized, uninfected = tp + fn, tn + fp
    n = parasitized + uninfected
    sensitivity, specificity = _ratio(tp, parasitized), _ratio(tn, uninfected)
    precision, negative_predictive_value = _ratio(tp, tp + fp), _ratio(tn, tn + fn)
    f1, f1_uninfected = _ratio(2 * tp, 2 * tp + fp + fn), _ratio(2 * tn, 2 * tn + fp + fn)

    def weighted(of_uninfected: Floats, of_parasitized: Floats) -> Floats:
        # A class without cells has weight 0, and 0 × NaN must not hide the other.
        uninfected_part = np.where(uninfected > 0, uninfected * of_uninfected, 0.0)
        parasitized_part = np.where(parasitized > 0, parasitized * of_parasitized, 0.0)
        mean: Floats = (uninfected_part + parasitized_part) / n
        return mean

    return {
        **dict(zip(COUNTS, (tp, fp, tn, fn), strict=True)),
        "accuracy": (tp + tn) / n,
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "precision": precision,
        "negative_predictive_value": negative_predictive_value,
        "f1": f1,
        "precision_uninfected": negative_predictive_value,
        "recall_uninfected": specificity,
        "f1_uninfected": f1_uninfected,
        "precision_weighted": weighted(negative_predictive_value, precision),
        "recall_weighted": weighted(specificity, sensitivity),
        "f1_weighted": weighted(f1_uninfected, f1),
        "matthews_correlation": _ratio(
            tp * tn - fp * fn, np.sqrt((tp + fp) * parasitized) * np.sqrt(uninfected * (tn + fn))
        ),
        "brier_score": squared_error / n,
        "log_loss": log_loss / n,
        "expected_calibration_error": np.abs(sums[:, 6:]).sum(axis=1) / n,
    }


def _metrics_of_ranks(ranks: Floats) -> dict[str, Floats]:
    """(r, 6) results of `_rank_sums` → each metric that needs the order of the scores, (r,)."""
    parasitized, uninfected, twice_area, precision_area, *at_specificity = ranks.T
    rates = {
        name: np.where(uninfected > 0, _ratio(true_positives, parasitized), np.nan)
        for name, true_positives in zip(_FALSE_POSITIVES_PER_MILLE, at_specificity, strict=True)
    }
    return {
        "roc_auc": _ratio(twice_area, 2 * parasitized * uninfected),
        "average_precision": _ratio(precision_area, parasitized),
        **rates,
    }


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    undefined = np.full(numerator.shape, np.nan)
    ratio: Floats = np.divide(numerator, denominator, out=undefined, where=denominator > 0)
    return ratio
