"""What is counted for each patient, and how patients are told apart by it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rates import of_beta

from malaria_ray import schema
from malaria_ray.errors import ConfigError, DatasetError
from malaria_ray.statistics.intervals import bootstrap_over_patients
from malaria_ray.statistics.patients import call_metrics, patient_counts, patient_metrics
from malaria_ray.statistics.rates import ErrorRates, fit_error_rates

CELLS = pd.DataFrame(
    [
        # Rows of one patient need not stand together.
        ("P2", 1, 0.9),
        ("P1", 0, 0.1),
        ("P2", 0, 0.5),  # on the threshold: called parasitized
        ("C201", 0, 0.2),
        ("P2", None, 0.1),  # P2 has a parasitized cell all the same
        ("P1", None, 0.2),  # P1 may have one
        (None, 1, 0.9),  # of no known patient
        ("C201", 0, 0.8),
    ],
    columns=["patient_id", "label", "score"],
)


def counts(cells: pd.DataFrame, threshold: float = 0.5) -> pd.DataFrame:
    return patient_counts(cells["patient_id"], cells["label"], cells["score"], threshold=threshold)


def test_counts_of_each_patient() -> None:
    table = counts(CELLS)
    assert table["patient_id"].tolist() == ["C201", "P1", "P2"]
    assert table["label"].fillna(-1).tolist() == [0, -1, 1]
    assert table["n_cells"].tolist() == [2, 2, 3]
    assert table["n_parasitized"].tolist() == [1, 0, 2]
    assert table["parasitized_fraction"].tolist() == pytest.approx([1 / 2, 0, 2 / 3])
    # Wilson 1927, worked for 1 of 2, 0 of 2 and 2 of 3 with z = 1.96.
    assert table["ci_low"].tolist() == pytest.approx([0.0945, 0, 0.2077], abs=5e-5)
    assert table["ci_high"].tolist() == pytest.approx([0.9055, 0.6576, 0.9385], abs=5e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("cells", [CELLS, CELLS[:1], CELLS[6:7]], ids=["many", "one", "no patient"])
def test_the_table_is_that_of_the_schema(cells: pd.DataFrame) -> None:
    table = counts(cells)
    assert list(table) == schema.PATIENTS.names
    arrow = pa.Table.from_pandas(table, schema=schema.PATIENTS.arrow_schema(), preserve_index=False)
    assert len(arrow) == cells["patient_id"].nunique()


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["P1", "P2", "C1", None]), st.sampled_from([0, 1, None]), st.integers(0, 8)),
        min_size=1,
        max_size=30,
    )
)
def test_counts_equal_a_recount(cells: list[tuple[str | None, int | None, int]]) -> None:
    ids, labels, eighths = zip(*cells, strict=True)
    table = patient_counts(ids, labels, np.array(eighths) / 8, threshold=0.5)
    assert table["patient_id"].tolist() == sorted({name for name in ids if name})
    for row in table.itertuples():
        own = [(label, score >= 4) for name, label, score in cells if name == row.patient_id]
        own_labels = [label for label, _ in own]
        assert (row.n_cells, row.n_parasitized) == (len(own), sum(called for _, called in own))
        if 1 in own_labels:
            assert row.label == 1
        elif None in own_labels:
            assert pd.isna(row.label)
        else:
            assert row.label == 0
        assert row.ci_low <= row.parasitized_fraction <= row.ci_high


def test_a_patient_has_one_label_in_all_splits_and_counts_of_each() -> None:
    cells = pd.DataFrame(
        [
            ("P1", "train", 1, 0.9),
            ("P1", "test", 0, 0.6),  # uninfected cells of an infected patient
            ("P1", "test", 0, 0.2),
            ("P2", "test", 0, 0.1),  # infected by a cell that is not here
            ("P3", "test", None, 0.9),  # so is P3, of which nothing here has a label
            ("C1", "val", 0, 0.1),
            ("C1", "test", None, 0.1),
        ],
        columns=["patient_id", "split", "label", "score"],
    )
    table = patient_counts(
        cells["patient_id"],
        cells["label"],
        cells["score"],
        threshold=0.5,
        split=cells["split"],
        parasitized={"P2", "P3", "P9"},
    )
    assert table[["patient_id", "split"]].agg(" ".join, axis=1).tolist() == [
        *("C1 test", "C1 val", "P1 test", "P1 train", "P2 test", "P3 test")
    ]
    assert table["label"].fillna(-1).tolist() == [-1, -1, 1, 1, 1, -1]
    assert table["n_cells"].tolist() == [1, 1, 2, 1, 1, 1]
    assert table["n_parasitized"].tolist() == [0, 0, 1, 1, 0, 1]


def test_counts_do_not_depend_on_row_order() -> None:
    pd.testing.assert_frame_equal(counts(CELLS), counts(CELLS[::-1]))


@pytest.mark.parametrize(
    ("patient_id", "label", "score", "message"),
    [
        (["P1"], [2], [0.1], r"label of row 0 is 2 .* or null"),
        (["P1"], ["parasitized"], [0.1], "label of row 0 is parasitized"),
        (["P1"], [0], [np.nan], "score of row 0 is nan"),
        (["P1", "P2"], [0], [0.1], "2 rows of patient_id, 1 rows of label, 1 rows of score"),
        ([], [], [], "no cells"),
    ],
)
def test_bad_rows_are_named(patient_id: list[str], label: list[object], score: list[float], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        patient_counts(patient_id, label, score, threshold=0.5)  # type: ignore[arg-type]


def test_a_threshold_outside_the_scores_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"threshold is 5\.0"):
        counts(CELLS, threshold=5.0)


def patients(*rows: tuple[int | None, float]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["label", "parasitized_fraction"])
    return table.assign(label=table["label"].astype("Int8"))


def test_patients_told_apart_by_their_fraction() -> None:
    found = patient_metrics(patients((0, 0.0), (0, 0.1), (0, 0.5), (1, 0.3), (1, 0.9), (None, 1.0)))
    assert found == pytest.approx(
        {
            "n_patients_parasitized": 2,
            "n_patients_uninfected": 3,
            # 0.9 lies above all three uninfected patients, 0.3 above two.
            "roc_auc": 5 / 6,
            "average_precision": 1 / 2 * 1 + 1 / 2 * 2 / 3,
            "false_positive_rate_mean": 0.2,
            "false_positive_rate_sd": np.std([0, 0.1, 0.5], ddof=1),
            "false_positive_rate_max": 0.5,
        }
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("rows", "defined"),
    [
        ([(None, 0.5)], set()),
        ([(0, 0.5)], {"false_positive_rate_mean", "false_positive_rate_max"}),
        ([(1, 0.5)], {"average_precision"}),
    ],
    ids=["unlabelled", "one uninfected", "one parasitized"],
)
def test_what_is_undefined_is_nan(rows: list[tuple[int | None, float]], defined: set[str]) -> None:
    found = patient_metrics(patients(*rows))
    assert {name for name, value in found.items() if not np.isnan(value)} == defined | {
        "n_patients_parasitized",
        "n_patients_uninfected",
    }


def test_the_bootstrap_takes_patients_as_its_cells() -> None:
    rng = np.random.default_rng(0)
    label = np.arange(40) % 2
    fraction = np.clip(rng.normal(0.2 + 0.3 * label, 0.2), 0, 1)
    value = patient_metrics(patients(*zip(label, fraction, strict=True)))["roc_auc"]
    low, high = bootstrap_over_patients(label, fraction, np.arange(40), threshold=0.5, seed=0, n_resamples=200)[
        "roc_auc"
    ]
    assert low < value < high


RATES = ErrorRates(
    false_positive=of_beta(1, 49),
    false_negative=of_beta(3, 47),
    threshold=0.5,
)
CORRECTED = ["corrected_fraction", "corrected_ci_low", "corrected_ci_high", "call", "call_threshold"]


def one_patient(n_parasitized: int, n_cells: int) -> pd.Series:
    score = np.where(np.arange(n_cells) < n_parasitized, 0.9, 0.1)
    table = patient_counts(["P1"] * n_cells, [None] * n_cells, score, threshold=0.5, rates=RATES)
    assert list(table) == schema.PATIENTS.names
    pa.Table.from_pandas(table, schema=schema.PATIENTS.arrow_schema(), preserve_index=False)
    return table.iloc[0]


@pytest.mark.filterwarnings("error")
def test_a_single_unlabelled_patient_gets_a_corrected_fraction_and_a_call() -> None:
    patient = one_patient(60, 200)
    assert patient["corrected_fraction"] == pytest.approx((0.3 - 0.02) / (1 - 0.02 - 0.06))
    assert patient["corrected_ci_low"] < patient["corrected_fraction"] < patient["corrected_ci_high"]
    assert (patient["call"], patient["n_more_cells"]) == ("positive", 0)
    assert 0.02 < patient["call_threshold"] < patient["limit_of_detection"] < 0.3


@pytest.mark.filterwarnings("error")
def test_ten_cells_without_a_parasite_decide_nothing() -> None:
    patient = one_patient(0, 10)
    assert (patient["corrected_fraction"], patient["corrected_ci_low"]) == (0, 0)
    assert patient["corrected_ci_high"] > 0.2
    assert patient["call"] == "undecided"
    assert one_patient(0, 10 + patient["n_more_cells"])["call"] == "negative"


def test_without_rates_of_error_nothing_is_corrected_and_nobody_called() -> None:
    assert counts(CELLS)[[*CORRECTED, "limit_of_detection", "n_more_cells"]].isna().all().all()


def test_no_patient_is_an_empty_table_with_rates_too() -> None:
    table = patient_counts([None], [0], [0.1], threshold=0.5, rates=RATES)
    assert len(table) == 0
    assert list(table) == schema.PATIENTS.names


def test_rates_of_another_threshold_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"threshold is 0\.7 and the rates of error were learnt at 0\.5"):
        patient_counts(["P1"], [0], [0.1], threshold=0.7, rates=RATES)


def test_a_healthy_population_is_not_full_of_parasites_after_correction() -> None:
    # The article's best model: 1.74 % false positives a cell would be 87,000 parasites a microlitre.
    rng = np.random.default_rng(0)
    patient, validation = (np.repeat([f"{kind}{i}" for i in range(40)], 300) for kind in "CV")
    label = np.tile(np.arange(300) % 2, 40)
    score = np.where(rng.random(12_000) < 0.0174, 0.9, 0.1)
    rates = fit_error_rates(validation, label, np.where(label == 1, 0.9, rng.permutation(score)), threshold=0.5)
    table = patient_counts(patient, np.zeros(12_000), score, threshold=0.5, rates=rates)
    assert table["parasitized_fraction"].mean() > 0.015
    assert (table["corrected_ci_low"] == 0).mean() >= 0.95
    assert call_metrics(table)["specificity"] >= 0.95


def test_call_metrics_count_the_undecided_as_not_positive() -> None:
    table = pd.DataFrame(
        {
            "label": pd.Series([1, 1, 1, 0, 0, None], dtype="Int8"),
            "call": ["positive", "undecided", "negative", "undecided", "positive", "positive"],
        }
    )
    assert call_metrics(table) == pytest.approx({"sensitivity": 1 / 3, "specificity": 1 / 2, "n_patients_undecided": 2})


@pytest.mark.filterwarnings("error")
def test_call_metrics_of_no_calls_are_nan() -> None:
    found = call_metrics(counts(CELLS))
    assert np.isnan([found["sensitivity"], found["specificity"]]).all()
    assert found["n_patients_undecided"] == 0
