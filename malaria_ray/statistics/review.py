"""Which images a person should look at, why, and which first.

A look is worth the chance that the call is wrong times what hangs on it. The chance is that of the score where nothing
speaks against the score, and a convention where something does (`DISTRUSTED`, `COIN`): the order is meant to be good,
the numbers are no probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import expit

from malaria_ray.errors import ConfigError
from malaria_ray.schema import Call, ReviewReason
from malaria_ray.statistics.calibration import Calibration, logits
from malaria_ray.statistics.metrics import Floats, called_parasitized, check_lengths, check_scores

UNCERTAIN = 0.2
"""Least `uncertainty` of a call that asks for a look: odds of less than 9 to 1 on either side of the threshold."""

DISTRUSTED = 0.25
"""Chance of a wrong call supposed for an image of odd quality or unlike the training set: half of a coin's."""

COIN = 0.5
"""That of a cell called parasitized in an undecided patient: as many are called as false positives would be."""


def uncertainty(score: ArrayLike, calibration: Calibration) -> Floats:
    """(n,) float64 in 0..1: 1 for a score on the threshold, towards 0 far from it.

    It is twice the chance of a wrong call where the threshold is where the calibrated score is 0.5 (uncertainty
    sampling: Lewis & Gale 1994), and moves with the threshold: 2 · sigmoid(-|logit(score) - logit(threshold)| /
    temperature). Raises DatasetError for bad scores.
    """
    scores = check_scores(score)
    gap = np.abs(logits(scores) - logits(np.array([calibration.threshold])))
    found: Floats = 2 * expit(-gap / calibration.temperature)
    return found


def review(
    image_id: ArrayLike,
    score: ArrayLike,
    *,
    calibration: Calibration,
    quality_flags: Sequence[Sequence[str]] | None = None,
    is_novel: ArrayLike | None = None,
    patient_id: ArrayLike | None = None,
    patient_call: ArrayLike | None = None,
    uncertain: float = UNCERTAIN,
) -> pd.DataFrame:
    """The columns of `schema.REVIEW`, one row per image in the order given; what is not known is left out (None).

    image_id       (n,) of strings
    score          (n,) in 0..1, as the model gives it
    quality_flags  n lists, as `cells.quality.flags` makes them
    is_novel       (n,) bool: farther from the training set than `Novelty.threshold`
    patient_id     (n,) of strings or null
    patient_call   (n,) of `Call` or null: of the image's patient, by the cells of the image's split
    uncertain      least uncertainty that asks for a look, in 0..1

    `rank` is 1 for the image to look at first and null where nothing asks for a look; equal values go by uncertainty,
    then by name. Raises DatasetError for bad scores or lengths, ConfigError for a flag out of range.
    """
    if not 0 < uncertain <= 1:
        raise ConfigError(f"uncertain is {uncertain}: allowed is above 0 and up to 1")
    scores = check_scores(score)
    n = len(scores)
    names = np.asarray(image_id, dtype=object)
    patients = np.full(n, None, dtype=object) if patient_id is None else np.asarray(patient_id, dtype=object)
    flags = [()] * n if quality_flags is None else quality_flags
    novel = np.zeros(n, bool) if is_novel is None else np.asarray(is_novel, dtype=bool)
    calls = np.full(n, None, dtype=object) if patient_call is None else np.asarray(patient_call, dtype=object)
    check_lengths(
        image_id=len(names),
        score=n,
        patient_id=len(patients),
        patient_call=len(calls),
        quality_flags=len(flags),
        is_novel=len(novel),
    )

    doubt = uncertainty(scores, calibration)
    called = called_parasitized(scores, calibration.threshold)
    of_undecided = calls == Call.undecided
    applies = {
        ReviewReason.undecided_patient: of_undecided & called,
        ReviewReason.uncertain: doubt >= uncertain,
        ReviewReason.novel: novel,
        ReviewReason.quality: np.array([len(found) > 0 for found in flags], dtype=bool),
    }
    floor = np.select(
        [applies[ReviewReason.undecided_patient], novel | applies[ReviewReason.quality]], [COIN, DISTRUSTED], 0.0
    )
    needs = np.any(list(applies.values()), axis=0)
    table = pd.DataFrame(
        {
            "image_id": names,
            "patient_id": patients,
            "score": scores,
            "predicted_label": called.astype(np.int8),
            "needs_review": needs,
            "reasons": [[reason.value for reason in applies if applies[reason][i]] for i in range(n)],
            "quality_flags": [[str(flag) for flag in found] for found in flags],
            "uncertainty": doubt,
            "value": np.maximum(doubt / 2, floor) * np.where(of_undecided, 2, 1),
        }
    )
    wanted = table[needs].sort_values(["value", "uncertainty", "image_id"], ascending=[False, False, True])
    rank = pd.Series(np.arange(1, len(wanted) + 1), index=wanted.index).reindex(table.index)
    return table.assign(rank=rank.astype("Int64"))
