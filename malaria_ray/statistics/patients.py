"""What the calls of a patient's cells say about the patient.

The fraction of crops called parasitized is not parasitaemia: an archive of crops does not hold every cell of
a smear, and a class-balanced one holds far more parasitized cells than blood does. For the same reason the
patient-level ROC AUC of such an archive says little about screening: its infected patients were given their
fraction by whoever chose the crops.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from malaria_ray.schema import Call, Label
from malaria_ray.statistics import calls
from malaria_ray.statistics.intervals import patient_codes, wilson
from malaria_ray.statistics.metrics import (
    called_parasitized,
    cell_metrics,
    check_labels,
    check_lengths,
    check_scores,
)
from malaria_ray.statistics.rates import ErrorRates, check_same_threshold


def patient_counts(
    patient_id: ArrayLike,
    label: ArrayLike,
    score: ArrayLike,
    *,
    threshold: float,
    split: ArrayLike | None = None,
    parasitized: Collection[str] = (),
    rates: ErrorRates | None = None,
) -> pd.DataFrame:
    """The columns of `schema.PATIENTS`, one row per patient and split, sorted by both.

    patient_id   (n,) of strings; cells without one (null) are left out
    label        (n,) of 0, 1 or null. A patient is 1 with any cell of 1 in any split, 0 where all are 0, else null
    score        (n,) float32 or float64 in 0..1; a cell is called parasitized where `score >= threshold`
    split        (n,) of strings; without, the cells are of one split and its column is null
    parasitized  patients with a cell of 1 that is not among these: they are 1, but for those without any label here

    `ci_low` and `ci_high` are Wilson's interval of `parasitized_fraction`, for the crops of this row
    alone. The columns after them are of `statistics.calls`, from the model's `rates` of error at the same threshold,
    and null without: fractions corrected for them, the call, the limit of detection.

    Raises DatasetError for bad labels, scores or lengths, ConfigError for a threshold out of range or other than
    that of the rates.
    """
    scores = check_scores(score)
    labels = check_labels(label, nullable=True)
    codes, ids = patient_codes(patient_id)
    check_lengths(patient_id=len(codes), label=len(labels), score=len(scores))
    split_of_cell = np.full(len(scores), None, dtype=object) if split is None else np.asarray(split, dtype=object)
    check_lengths(score=len(scores), split=len(split_of_cell))
    split_codes, splits = pd.factorize(split_of_cell, sort=True, use_na_sentinel=False)

    has_patient = codes >= 0

    def per_patient(cells: np.ndarray) -> np.ndarray:
        return np.bincount(codes[cells & has_patient], minlength=len(ids))

    n_labelled = per_patient(~np.isnan(labels))
    is_parasitized = per_patient(labels == Label.parasitized) > 0
    is_parasitized |= (n_labelled > 0) & pd.Index(ids).isin(list(parasitized))
    unless_parasitized = np.where(n_labelled < per_patient(has_patient), np.nan, float(Label.uninfected))
    patient_label = np.where(is_parasitized, float(Label.parasitized), unless_parasitized)

    rows, row = np.unique((codes * len(splits) + split_codes)[has_patient], return_inverse=True)
    patient_of_row, split_of_row = np.divmod(rows, len(splits))
    n_cells = np.bincount(row, minlength=len(rows))
    n_parasitized = np.bincount(row[called_parasitized(scores, threshold)[has_patient]], minlength=len(rows))
    ci_low, ci_high = wilson(n_parasitized, n_cells)
    table = pd.DataFrame(
        {
            "patient_id": ids[patient_of_row],
            "label": pd.Series(patient_label[patient_of_row]).astype("Int8"),
            "n_cells": n_cells,
            "n_parasitized": n_parasitized,
            "parasitized_fraction": n_parasitized / n_cells,
            "ci_low": ci_low,
            "ci_high": ci_high,
        }
    )
    table = table.assign(**_corrected(table, threshold, rates))
    return table.assign(split=splits[split_of_row])


def _corrected(table: pd.DataFrame, threshold: float, rates: ErrorRates | None) -> dict[str, Any]:
    """The columns of `schema.PATIENTS` that need the model's rates of error."""
    if rates is None:
        unknown = pd.Series(np.nan, index=table.index)
        return {
            "corrected_fraction": unknown,
            "corrected_ci_low": unknown,
            "corrected_ci_high": unknown,
            "call": pd.Series(None, index=table.index, dtype=object),
            "call_threshold": unknown,
            "limit_of_detection": unknown,
            "n_more_cells": unknown.astype("Int64"),
        }
    check_same_threshold(rates, threshold)
    k, n = table["n_parasitized"].to_numpy(), table["n_cells"].to_numpy()
    value, low, high = calls.corrected_fraction(k, n, rates)
    return {
        "corrected_fraction": value,
        "corrected_ci_low": low,
        "corrected_ci_high": high,
        "call": calls.patient_call(k, n, rates),
        "call_threshold": calls.call_threshold(rates),
        "limit_of_detection": calls.limit_of_detection(n, rates),
        "n_more_cells": calls.n_more_cells(k, n, rates),
    }


def call_metrics(patients: pd.DataFrame) -> dict[str, float]:
    """How the calls of labelled patients fit their labels, from rows of `patient_counts` of one split, with rates of
    error.

    `sensitivity` is the share of parasitized patients called positive, `specificity` that of uninfected patients not
    called positive; an undecided patient is thus missed by the one and not accused by the other, and
    `n_patients_undecided` says how many there are. NaN where undefined.
    """
    labelled = patients[patients["label"].notna() & patients["call"].notna()]
    is_parasitized = (labelled["label"] == Label.parasitized).to_numpy(dtype=bool)
    is_positive = (labelled["call"] == Call.positive).to_numpy(dtype=bool)
    return {
        "sensitivity": float(pd.Series(is_positive[is_parasitized], dtype=float).mean()),
        "specificity": float(pd.Series(~is_positive[~is_parasitized], dtype=float).mean()),
        "n_patients_undecided": float((labelled["call"] == Call.undecided).sum()),
    }


def patient_metrics(patients: pd.DataFrame) -> dict[str, float]:
    """How well `parasitized_fraction` tells labelled patients apart, from rows of `patient_counts` of one split.

    `n_patients_parasitized` and `n_patients_uninfected` count the patients with a label; `roc_auc` and
    `average_precision` take the fraction as the score of a patient. An uninfected patient's fraction is that
    patient's false positive rate: its mean, standard deviation (n - 1) and maximum over these patients are
    the noise above which an infection must stand out. NaN where undefined: no patients, or one class only.

    Intervals: `intervals.bootstrap_over_patients` of the labelled patients with the fraction as score.
    """
    labelled = patients[patients["label"].notna()]
    is_parasitized = (labelled["label"] == Label.parasitized).to_numpy(dtype=bool)
    fraction = labelled["parasitized_fraction"]
    false_positive_rate = fraction[~is_parasitized]
    ranked = cell_metrics(is_parasitized, fraction, threshold=0.5) if len(labelled) else {}
    return {
        "n_patients_parasitized": float(is_parasitized.sum()),
        "n_patients_uninfected": float((~is_parasitized).sum()),
        "roc_auc": ranked.get("roc_auc", np.nan),
        "average_precision": ranked.get("average_precision", np.nan),
        "false_positive_rate_mean": float(false_positive_rate.mean()),
        "false_positive_rate_sd": float(false_positive_rate.std(ddof=1)),
        "false_positive_rate_max": float(false_positive_rate.max()),
    }
