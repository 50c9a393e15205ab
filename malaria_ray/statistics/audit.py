"""Labels that are likely wrong, by models that have not seen them.

Throughout, `label` is (n,) of 0 or 1 without nulls, and scores are out-of-fold: of models that have not learnt from the
image, best of all from none of its patient. A model that has learnt a wrong label agrees with it. NaN stands where a
model gives no such score; every image needs one of one model at least.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
from cleanlab.filter import find_label_issues
from numpy.typing import ArrayLike, NDArray

from malaria_ray.errors import DatasetError
from malaria_ray.schema import Label
from malaria_ray.statistics.metrics import Integers, cell_metrics, check_cells, check_lengths


def likely_wrong(label: ArrayLike, scores: Mapping[str, ArrayLike]) -> NDArray[np.bool_]:
    """(n,) bool, True where the label is likely wrong.

    scores  out-of-fold scores by model, each (n,) in 0..1 or NaN; those of an image are averaged

    Confident learning: Northcutt et al. 2021, Confident learning: estimating uncertainty in dataset labels, pruning by
    noise rate, as the library cleanlab does it. The number of wrong labels of each class is estimated by how often
    images are scored as the other class as surely as that class is on average, and so many of the least credible are
    returned, never the only cell of a class. It sees what models and labels disagree about, be it the label that is
    wrong or the models.

    Raises DatasetError for bad labels or scores, no model, or one class only.
    """
    labels, probability = mean_score(label, scores)
    pred_probs = np.column_stack([1 - probability, probability])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "May not flag all label issues", UserWarning)  # one cell of a class: never
        found: NDArray[np.bool_] = find_label_issues(labels, pred_probs, filter_by="prune_by_noise_rate", n_jobs=1)
    return found


def label_audit(
    image_id: ArrayLike, label: ArrayLike, scores: Mapping[str, ArrayLike], *, patient_id: ArrayLike | None = None
) -> pd.DataFrame:
    """The columns of `schema.LABEL_AUDIT`: one row per image whose label is likely wrong, the least credible first.

    image_id    (n,) of strings
    patient_id  (n,) of strings or null
    Raises as `likely_wrong` does.
    """
    labels, probability = mean_score(label, scores)
    names = np.asarray(image_id, dtype=object)
    patients = np.full(len(labels), None, object) if patient_id is None else np.asarray(patient_id, dtype=object)
    check_lengths(label=len(labels), image_id=len(names), patient_id=len(patients))
    by_model = np.stack([np.asarray(score, dtype=np.float64) for score in scores.values()])
    given = ~np.isnan(by_model)
    against = given & ((by_model >= 0.5) != (labels == Label.parasitized))
    table = pd.DataFrame(
        {
            "image_id": names,
            "patient_id": patients,
            "label": labels.astype(np.int8),
            "suggested_label": (1 - labels).astype(np.int8),
            "label_credibility": np.where(labels == Label.parasitized, probability, 1 - probability),
            "score_mean": probability,
            "score_min": np.nanmin(by_model, axis=0),
            "score_max": np.nanmax(by_model, axis=0),
            "n_models": given.sum(axis=0),
            "n_models_against": against.sum(axis=0),
        }
    )
    return table[likely_wrong(label, scores)].sort_values(["label_credibility", "image_id"], ignore_index=True)


def metrics_with_and_without(
    label: ArrayLike, score: ArrayLike, is_left_out: ArrayLike, *, threshold: float
) -> pd.DataFrame:
    """Columns metric, value, n, value_without, n_without: metrics of all cells, and of all but those left out.

    is_left_out  (n,) bool, where the label is likely wrong

    The truth lies between: labels were left out because models disagree with them, which flatters any model that errs
    alike, and much the most the model that they were found by. Values are NaN where nothing is left.
    Raises as `metrics.cell_metrics` does.
    """
    labels, scores = check_cells(label, score)
    left_out = np.asarray(is_left_out, dtype=bool)
    check_lengths(label=len(labels), is_left_out=len(left_out))
    kept = ~left_out
    whole = cell_metrics(labels, scores, threshold=threshold)
    rest = cell_metrics(labels[kept], scores[kept], threshold=threshold) if kept.any() else {}
    return pd.DataFrame(
        {
            "metric": list(whole),
            "value": list(whole.values()),
            "n": len(labels),
            "value_without": [rest.get(name, np.nan) for name in whole],
            "n_without": int(kept.sum()),
        }
    )


def mean_score(label: ArrayLike, scores: Mapping[str, ArrayLike]) -> tuple[Integers, NDArray[np.float64]]:
    """(n,) labels and (n,) float64 mean of the scores that each image has, both checked. Raises as `likely_wrong`."""
    if not scores:
        raise DatasetError("no model: a label is audited by the out-of-fold scores of one model or more")
    by_model = [np.asarray(score, dtype=np.float64) for score in scores.values()]
    of_label = pd.Series(label).to_numpy()
    for score in by_model:
        check_lengths(label=len(of_label), score=len(score))
    given = ~np.isnan(np.stack(by_model))
    for score, has_score in zip(by_model, given, strict=True):
        if has_score.any():
            check_cells(of_label[has_score], score[has_score])
    n = given.sum(axis=0)
    mean = np.divide(np.nansum(by_model, axis=0), n, out=np.full(given.shape[1], np.nan), where=n > 0)
    labels, probability = check_cells(label, mean)
    missing = [value.name for value in Label if not np.any(labels == value)]
    if missing:
        raise DatasetError(f"none of the {len(labels)} cells is {missing[0]}: labels of one class cannot be audited")
    return labels, probability.astype(np.float64)
