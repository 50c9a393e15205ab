"""Which image goes to training, validation and test. Pure functions of names, labels, patients and a seed."""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import pandas as pd

from malaria_ray.errors import DatasetError
from malaria_ray.schema import Label, Split

SplitBy = Literal["patient", "image"]

N_TENTHS = {Split.train: 6, Split.val: 1, Split.test: 3}
"""60:10:30 as in the article's text (its code gives 63:7:30)."""


def assign_splits(
    cells: pd.DataFrame, *, by: SplitBy, seed: int, n_folds: int | None = None, fold: int | None = None
) -> pd.Series:
    """Split of each cell, `train`, `val` or `test`, 60:10:30 with the classes balanced between them.

    With `n_folds` the test split is fold number `fold` (1 the first) of so many, and validation a tenth of the rest:
    the test splits of all folds are the whole dataset, each cell once.

    `cells`: columns image_id, patient_id, label (0 or 1), one row per usable image, in any order: the result depends
    on the content alone. By `patient` all cells of a patient go together (stratified group folds); by `image` every
    cell for itself, as in the article, which lets the same patient into training and test. Copies of an image, by the
    column content_digest where it is there, then go together.
    Returns: a string series with the index of `cells`.
    Raises: `DatasetError` where labels or patients are missing or a split would lack a class.
    """
    check_trainable(cells, by=by)
    if n_folds is None or fold is None:
        tenth = _folds(cells, by=by, n_folds=10, seed=seed)
        bounds = np.cumsum(list(N_TENTHS.values()))
        names = np.array([split.value for split in N_TENTHS])
        splits = pd.Series(names[np.searchsorted(bounds, tenth, side="right")], index=cells.index, name="split")
    else:
        is_test = _folds(cells, by=by, n_folds=n_folds, seed=seed) == fold - 1
        tenth_of_rest = np.full(len(cells), -1)
        tenth_of_rest[~is_test] = _folds(cells[~is_test], by=by, n_folds=10, seed=seed)
        names = np.where(is_test, Split.test.value, np.where(tenth_of_rest == 0, Split.val.value, Split.train.value))
        splits = pd.Series(names, index=cells.index, name="split")
    for split in Split:
        classes = cells.loc[splits == split, "label"].unique()
        if len(classes) < len(Label):
            found = ", ".join(Label(int(value)).name for value in classes) or "no cells"
            raise DatasetError(
                f"the {split} split by {by} with seed {seed} has {found} only; both classes are needed: "
                "add patients, try another --seed, or use --split-by image"
            )
    return splits


def check_trainable(cells: pd.DataFrame, *, by: SplitBy) -> None:
    """Raises `DatasetError` where `cells` lacks labels, a class, or (by patient) patients."""
    unlabelled = int(cells["label"].isna().sum())
    if unlabelled:
        first = cells.loc[cells["label"].isna(), "image_id"].min()
        raise DatasetError(
            f"{unlabelled} of {len(cells)} cells have no label, {first!r} the first; training needs all of them in "
            "folders named Parasitized or Uninfected"
        )
    if cells["label"].nunique() < len(Label):
        found = ", ".join(Label(int(value)).name for value in cells["label"].unique()) or "no cells at all"
        raise DatasetError(f"the dataset has {found} only; training needs uninfected and parasitized cells")
    without = int(cells["patient_id"].isna().sum())
    if by == "patient" and without:
        first = cells.loc[cells["patient_id"].isna(), "image_id"].min()
        raise DatasetError(
            f"{without} of {len(cells)} cells have no patient, {first!r} the first; give their mapping to "
            "'ingest --patients' or their rule to 'ingest --patient-pattern', or train with --split-by image"
        )


def _folds(cells: pd.DataFrame, *, by: SplitBy, n_folds: int, seed: int) -> np.ndarray:
    """Fold of each row of `cells`, int64 in 0..n_folds-1; the rows' order does not matter."""
    order = np.argsort(cells["image_id"].to_numpy(dtype=object), kind="stable")
    if by == "image" and "content_digest" in cells:
        digests = cells["content_digest"].fillna(cells["image_id"]).to_numpy(dtype=object)
        firsts = order[~pd.Series(digests[order]).duplicated()]
        of_firsts = _folds(cells.iloc[firsts].drop(columns="content_digest"), by=by, n_folds=n_folds, seed=seed)
        return pd.Series(of_firsts, digests[firsts]).loc[digests].to_numpy()
    ordered = cells.iloc[order]
    group = "patient_id" if by == "patient" else "image_id"
    n_groups = ordered[group].nunique()
    ratio = "60:10:30" if n_folds == 10 else f"into {n_folds} folds"
    if n_groups < n_folds:
        raise DatasetError(
            f"{n_groups} {by}s cannot be divided {ratio}; at least {n_folds} are needed"
            + (", or use --split-by image" if by == "patient" else "")
        )
    most = int(ordered["label"].value_counts().max())
    if most < n_folds:
        raise DatasetError(
            f"{len(ordered)} cells, {most} of the commoner class, cannot be divided {ratio}; at least {n_folds} of a "
            "class are needed"
        )
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # 1 s, which workers do not need

    folds = np.empty(len(ordered), np.int64)
    stratified = StratifiedGroupKFold if by == "patient" else StratifiedKFold
    splitter = stratified(n_splits=n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # a class with fewer patients than folds is looked at afterwards, by its split
        warnings.simplefilter("ignore", UserWarning)
        for fold, (_, rows) in enumerate(splitter.split(ordered, ordered["label"].astype(int), ordered[group])):
            folds[order[rows]] = fold
    return folds
