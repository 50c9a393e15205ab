"""Who goes to training, validation and test."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from malaria_ray.cells.splits import assign_splits
from malaria_ray.errors import DatasetError

SHARES = {"train": 0.6, "val": 0.1, "test": 0.3}


def cells(
    n_patients: int, *, n_cells: tuple[int, int] = (20, 60), n_healthy: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """Rows as in a manifest: infected patients have cells of both classes, healthy ones (a quarter) of one."""
    rng = np.random.default_rng([seed])
    n_healthy = n_patients // 4 if n_healthy is None else n_healthy
    rows = []
    for patient in range(n_patients):
        is_healthy = patient < n_healthy
        for cell in range(rng.integers(*n_cells, endpoint=True)):
            label = 0 if is_healthy else int(rng.random() < 0.65)
            rows.append((f"{label}/{patient}_{cell}.png", f"P{patient}", label))
    table = pd.DataFrame(rows, columns=["image_id", "patient_id", "label"])
    return table.astype({"label": "Int8"})


@settings(max_examples=10, deadline=None)
@given(n_patients=st.integers(16, 40), seed=st.integers(0, 2**31), split_seed=st.integers(0, 2**31))
def test_no_patient_is_in_two_splits(n_patients: int, seed: int, split_seed: int) -> None:
    table = cells(n_patients, n_cells=(5, 20), seed=seed)
    try:
        splits = assign_splits(table, by="patient", seed=split_seed)
    except DatasetError:  # few patients: one split may lack healthy cells, and then it is refused
        return
    assert splits.index.equals(table.index)
    assert set(splits) == set(SHARES)
    assert (splits.groupby(table["patient_id"]).nunique() == 1).all()
    assert (table["label"].groupby(splits).nunique() == 2).all()


@settings(max_examples=6, deadline=None)
@given(order=st.randoms(use_true_random=False), by=st.sampled_from(["patient", "image"]))
def test_splits_do_not_depend_on_row_order(order, by) -> None:
    table = cells(30)
    expected = assign_splits(table, by=by, seed=42)
    rows = list(range(len(table)))
    order.shuffle(rows)
    shuffled = table.iloc[rows]
    pd.testing.assert_series_equal(assign_splits(shuffled, by=by, seed=42).sort_index(), expected)


def test_splits_do_not_depend_on_the_index() -> None:
    table = cells(30)
    expected = assign_splits(table, by="patient", seed=42)
    doubled = table.set_index(pd.Index([7] * len(table)))  # as after pd.concat without ignore_index
    assert assign_splits(doubled, by="patient", seed=42).tolist() == expected.tolist()


def test_other_columns_do_not_matter() -> None:
    table = cells(30)
    more = table.assign(width=np.arange(len(table)), status="ok")
    assert assign_splits(more, by="patient", seed=1).equals(assign_splits(table, by="patient", seed=1))


def test_the_seed_decides() -> None:
    table = cells(40)
    first, again, other = (assign_splits(table, by="patient", seed=seed) for seed in (1, 1, 2))
    assert first.equals(again)
    assert not first.equals(other)


@pytest.mark.parametrize(
    ("by", "within"),
    [
        ("patient", 0.04),  # patients differ in their number of cells
        ("image", 0.002),
    ],
)
def test_sizes_are_near_60_10_30_and_both_classes_in_each(by, within: float) -> None:
    table = cells(80)
    splits = assign_splits(table, by=by, seed=42)
    for split, share in SHARES.items():
        assert (splits == split).mean() == pytest.approx(share, abs=within)
        parasitized = table.loc[splits == split, "label"].mean()
        assert parasitized == pytest.approx(table["label"].mean(), abs=0.1 if by == "patient" else 0.005)


def test_by_image_a_patient_may_be_in_two_splits() -> None:
    table = cells(30)
    splits = assign_splits(table, by="image", seed=42)
    assert (splits.groupby(table["patient_id"]).nunique() > 1).any()


def test_by_image_no_patients_are_needed() -> None:
    table = cells(30).assign(patient_id=None)
    assert set(assign_splits(table, by="image", seed=42)) == set(SHARES)


def without(table: pd.DataFrame, column: str, rows: slice) -> pd.DataFrame:
    changed = table.astype({"label": "Int8", "patient_id": "object"})
    changed.loc[changed.index[rows], column] = pd.NA
    return changed


@pytest.mark.parametrize(
    ("table", "by", "said"),
    [
        (cells(30).iloc[:0], "patient", "the dataset has no cells at all only; training needs uninfected and para"),
        (without(cells(30), "label", slice(None)), "patient", r"cells have no label, '0/0_0.png' the first; .*Parasit"),
        (without(cells(30), "label", slice(3, 5)), "image", r"^2 of \d+ cells have no label, '0/0_3.png' the first"),
        (cells(30, n_healthy=30), "patient", "the dataset has uninfected only; training needs"),
        (without(cells(30), "patient_id", slice(1)), "patient", r"^1 of \d+ cells have no patient.*--patient-pattern"),
        (cells(9, n_healthy=3), "patient", "^9 patients cannot be divided 60:10:30; at least 10 .*--split-by image"),
        (cells(30, n_cells=(1, 1)).iloc[5:13], "image", "^8 images cannot be divided 60:10:30; at least 10"),
        # 12 of 6 and 6, which scikit-learn refuses with a bare ValueError.
        (cells(12, n_cells=(1, 1)).assign(label=[0, 1] * 6), "image", "^12 cells, 6 of the commoner class, cannot"),
        (cells(12, n_cells=(1, 1)).assign(label=[0, 1] * 6), "patient", "^12 cells, 6 of the commoner class, cannot"),
    ],
)
def test_what_cannot_be_split_is_refused_with_what_to_do(table: pd.DataFrame, by, said: str) -> None:
    with pytest.raises(DatasetError) as caught:
        assign_splits(table, by=by, seed=42)
    assert re.search(said, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_class_of_a_single_patient_is_refused_with_the_split_that_lacks_it() -> None:
    table = cells(20, n_healthy=20)
    table.loc[table["patient_id"] == "P3", "label"] = 1
    with pytest.raises(
        DatasetError, match=r"split by patient with seed 42 has uninfected only; both classes are needed"
    ):
        assign_splits(table, by="patient", seed=42)


@pytest.mark.parametrize("by", ["patient", "image"])
def test_the_test_splits_of_all_folds_are_the_dataset_each_cell_once(by) -> None:
    table = cells(40)
    folds = [assign_splits(table, by=by, seed=42, n_folds=4, fold=fold) for fold in (1, 2, 3, 4)]
    times_in_test = sum((splits == "test").astype(int) for splits in folds)
    assert (times_in_test == 1).all()
    for splits in folds:
        assert (table["label"].groupby(splits).nunique() == 2).all()
        if by == "patient":
            assert (splits.groupby(table["patient_id"]).nunique() == 1).all()


def test_more_folds_than_patients_are_refused() -> None:
    with pytest.raises(DatasetError, match="30 patients cannot be divided into 31 folds; at least 31 are needed"):
        assign_splits(cells(30), by="patient", seed=42, n_folds=31, fold=1)


def test_by_image_copies_are_in_one_split_and_others_where_they_were_without_them() -> None:
    table = cells(16).assign(content_digest=lambda rows: rows["image_id"])
    alone = assign_splits(table, by="image", seed=3)
    copies = table[::3].assign(image_id=lambda rows: "copy_of_" + rows["image_id"])
    together = pd.concat([copies, table], ignore_index=True)
    splits = assign_splits(together, by="image", seed=3)
    assert splits.groupby(together["content_digest"]).nunique().max() == 1
    for split, share in SHARES.items():
        assert (splits == split).mean() == pytest.approx(share, abs=0.05)
    pd.testing.assert_series_equal(assign_splits(table.drop(columns="content_digest"), by="image", seed=3), alone)
