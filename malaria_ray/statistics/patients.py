"""What the calls of a patient's cells say about the patient.

The fraction of crops called parasitized is not parasitaemia: an archive of crops does not hold every cell of
a smear, and a class-balanced one holds far more parasitized cells than blood does. For the same reason the
patient-level ROC AUC of such an archive says little about screening: its infected patients were given their
fraction by whoever chose the crops.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from malaria_ray.schema import Label
from malaria_ray.statistics.intervals import patient_codes, wilson
from malaria_ray.statistics.metrics import (
    called_parasitized,
    cell_metrics,
    check_labels,
    check_lengths,
    check_scores,
)


def patient_counts(
    patient_id: ArrayLike,
    label: ArrayLike,
    score: ArrayLike,
    *,
    threshold: float,
    confidence: float = 0.95,
) -> pd.DataFrame:
    """The columns of `schema.PATIENTS`, one row per patient, sorted by patient_id.

    patient_id  (n,) of strings; cells without one (null) are left out
    label       (n,) of 0, 1 or null. A patient is 1 with any cell of 1, 0 where all are 0, else null
    score       (n,) float32 or float64 in 0..1; a cell is called parasitized where `score >= threshold`

    `ci_low` and `ci_high` are Wilson's interval of `parasitized_fraction`, for the crops of this patient
    alone.

    Raises DatasetError for bad labels, scores or lengths, ConfigError for a flag out of range.
    """
    scores = check_scores(score)
    labels = check_labels(label, nullable=True)
    codes, ids = patient_codes(patient_id)
    check_lengths(patient_id=len(codes), label=len(labels), score=len(scores))
    called = called_parasitized(scores, threshold)

    def per_patient(cells: np.ndarray) -> np.ndarray:
        return np.bincount(codes[cells & (codes >= 0)], minlength=len(ids))

    n_cells = per_patient(np.ones(len(codes), dtype=bool))
    n_parasitized = per_patient(called)
    any_unlabelled = per_patient(np.isnan(labels)) > 0
    unless_parasitized = np.where(any_unlabelled, np.nan, float(Label.uninfected))
    patient_label = np.where(per_patient(labels == Label.parasitized) > 0, Label.parasitized, unless_parasitized)
    ci_low, ci_high = wilson(n_parasitized, n_cells, confidence)
    return pd.DataFrame(
        {
            "patient_id": ids,
            "label": pd.Series(patient_label).astype("Int8"),
            "n_cells": n_cells,
            "n_parasitized": n_parasitized,
            "parasitized_fraction": n_parasitized / n_cells,
            "ci_low": ci_low,
            "ci_high": ci_high,
        }
    )


def patient_metrics(patients: pd.DataFrame) -> dict[str, float]:
    """How well `parasitized_fraction` tells labelled patients apart, from a table of `patient_counts`.

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
