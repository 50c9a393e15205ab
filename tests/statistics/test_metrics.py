"""Metrics equal scikit-learn's where that defines them, and are NaN, without warnings, where nothing does."""

from __future__ import annotations

import warnings
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import sklearn.calibration
import sklearn.metrics as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from malaria_ray.errors import ConfigError, DatasetError
from malaria_ray.statistics import metrics
from malaria_ray.statistics.metrics import cell_metrics

# Sixteenths, so that most scores are tied with others and many lie on the threshold or a bin's edge.
TIED_SCORES = st.integers(0, 16).map(lambda sixteenths: sixteenths / 16)
FLOAT32_SCORES = st.floats(0, 1, width=32)
CELLS = st.lists(st.tuples(st.integers(0, 1), st.one_of(TIED_SCORES, FLOAT32_SCORES)), min_size=1, max_size=60)
THRESHOLDS = st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0])


def arrays(cells: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    label, score = zip(*cells, strict=True)
    return np.array(label), np.array(score, dtype=np.float32)


def many_cells(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, n])
    label = rng.integers(2, size=n)
    return label, (1 / (1 + np.exp(-rng.normal(3 * label - 1.5, 1.5)))).astype(np.float32)


def scikit_learn_metrics(label: np.ndarray, score: np.ndarray, threshold: float) -> dict[str, float]:
    called = (score >= threshold).astype(int)
    nan = {"zero_division": np.nan}
    both = {"labels": [0, 1]}
    found = {
        "accuracy": reference.accuracy_score(label, called),
        "sensitivity": reference.recall_score(label, called, **nan),
        "specificity": reference.recall_score(label, called, pos_label=0, **nan),
        "precision": reference.precision_score(label, called, **nan),
        "negative_predictive_value": reference.precision_score(label, called, pos_label=0, **nan),
        "f1": reference.f1_score(label, called, **nan),
        "precision_uninfected": reference.precision_score(label, called, pos_label=0, **nan),
        "recall_uninfected": reference.recall_score(label, called, pos_label=0, **nan),
        "f1_uninfected": reference.f1_score(label, called, pos_label=0, **nan),
        "brier_score": reference.brier_score_loss(label, score, **both),
        "log_loss": reference.log_loss(label, score, **both),
    }
    if 0 < label.sum() < len(label):
        found["balanced_accuracy"] = reference.balanced_accuracy_score(label, called)
        found["roc_auc"] = reference.roc_auc_score(label, score)
        found["recall_weighted"] = reference.recall_score(label, called, average="weighted")
        found["f1_weighted"] = reference.f1_score(label, called, average="weighted")
    if label.any():
        found["average_precision"] = reference.average_precision_score(label, score)
    if 0 < label.sum() < len(label) and 0 < called.sum() < len(called):
        found["precision_weighted"] = reference.precision_score(label, called, average="weighted")
        found["matthews_correlation"] = reference.matthews_corrcoef(label, called)
    return found


def test_a_two_by_two_table_worked_by_hand() -> None:
    """40 true and 5 false positives, 45 true and 10 false negatives."""
    label = [1] * 40 + [0] * 5 + [0] * 45 + [1] * 10
    score = [0.9] * 45 + [0.2] * 55
    expected = {
        "n_true_positive": 40,
        "n_false_positive": 5,
        "n_true_negative": 45,
        "n_false_negative": 10,
        "accuracy": Fraction(85, 100),
        "balanced_accuracy": Fraction(85, 100),
        "sensitivity": Fraction(40, 50),
        "specificity": Fraction(45, 50),
        "precision": Fraction(40, 45),
        "negative_predictive_value": Fraction(45, 55),
        "f1": Fraction(80, 95),
        "precision_uninfected": Fraction(45, 55),
        "recall_uninfected": Fraction(45, 50),
        "f1_uninfected": Fraction(90, 105),
        "precision_weighted": (Fraction(40, 45) + Fraction(45, 55)) / 2,
        "recall_weighted": Fraction(85, 100),
        "f1_weighted": (Fraction(80, 95) + Fraction(90, 105)) / 2,
        "matthews_correlation": (40 * 45 - 5 * 10) / np.sqrt(45 * 50 * 50 * 55),
        "brier_score": (40 * 0.01 + 5 * 0.81 + 45 * 0.04 + 10 * 0.64) / 100,
        "log_loss": -(40 * np.log(0.9) + 5 * np.log(0.1) + 45 * np.log(0.8) + 10 * np.log(0.2)) / 100,
        # 45 cells at 0.9 of which 40/45 are parasitized, 55 cells at 0.2 of which 10/55 are.
        "expected_calibration_error": (45 * (0.9 - 40 / 45) + 55 * (0.2 - 10 / 55)) / 100,
        # One corner at (0.1, 0.8): half of a rectangle and triangles.
        "roc_auc": (0.8 + 0.9) / 2,
        "average_precision": 0.8 * 40 / 45 + 0.2 * 50 / 100,
        # Any threshold that calls a parasitized cell calls 5 of 50 uninfected ones.
        "sensitivity_at_specificity_0.99": 0,
        "sensitivity_at_specificity_0.999": 0,
    }
    assert cell_metrics(label, score, threshold=0.5) == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-12
    )


@settings(deadline=None)
@given(CELLS, THRESHOLDS)
def test_metrics_equal_those_of_scikit_learn(cells: list[tuple[int, float]], threshold: float) -> None:
    label, score = arrays(cells)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = scikit_learn_metrics(label, score, threshold)
    found = cell_metrics(label, score, threshold=threshold)
    # scikit-learn computes log loss and Brier score of float32 scores in float32.
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)


def test_metrics_of_many_cells_equal_those_of_scikit_learn() -> None:
    label, score = many_cells(20_000)
    score = score.astype(np.float64)
    expected = scikit_learn_metrics(label, score, 0.3)
    found = cell_metrics(label, score, threshold=0.3)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)


@settings(deadline=None)
@given(CELLS)
def test_sensitivity_at_specificity_is_the_best_of_all_thresholds(cells: list[tuple[int, float]]) -> None:
    label, score = arrays(cells * 20)
    found = cell_metrics(label, score, threshold=0.5)
    for name, specificity in (
        ("sensitivity_at_specificity_0.99", Fraction(99, 100)),
        ("sensitivity_at_specificity_0.999", Fraction(999, 1000)),
    ):
        if 0 < label.sum() < len(label):
            n_uninfected = int((label == 0).sum())
            sensitivities = [
                (score[label == 1] >= threshold).mean()
                for threshold in [np.inf, *score]
                if Fraction(int((score[label == 0] < threshold).sum()), n_uninfected) >= specificity
            ]
            assert found[name] == pytest.approx(max(sensitivities))
        else:
            assert np.isnan(found[name])


@settings(deadline=None)
@given(CELLS)
def test_expected_calibration_error_is_the_gap_of_the_calibration_curve(
    cells: list[tuple[int, float]],
) -> None:
    label, score = arrays(cells)
    curve = metrics.calibration_curve(label, score)
    gap = (curve["mean_score"] - curve["observed_share"]).abs()
    found = cell_metrics(label, score, threshold=0.5)["expected_calibration_error"]
    assert found == pytest.approx((gap * curve["n"]).sum() / len(label), abs=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("label", "score", "undefined"),
    [
        (
            [0, 0],
            [0.2, 0.7],
            {"sensitivity", "balanced_accuracy", "matthews_correlation", "roc_auc", "average_precision"}
            | {"sensitivity_at_specificity_0.99", "sensitivity_at_specificity_0.999"},
        ),
        (
            [1, 1],
            [0.2, 0.7],
            {"specificity", "recall_uninfected", "balanced_accuracy", "matthews_correlation", "roc_auc"}
            | {"sensitivity_at_specificity_0.99", "sensitivity_at_specificity_0.999"},
        ),
        # Nothing is called parasitized: no precision, hence none weighted over the classes either.
        ([0, 1], [0.2, 0.3], {"precision", "precision_weighted", "matthews_correlation"}),
        (
            [0, 1],
            [0.6, 0.7],
            {"negative_predictive_value", "precision_uninfected", "precision_weighted"} | {"matthews_correlation"},
        ),
    ],
    ids=["only uninfected", "only parasitized", "nothing called", "everything called"],
)
def test_what_is_undefined_is_nan_and_nothing_else_is(
    label: list[int], score: list[float], undefined: set[str]
) -> None:
    found = cell_metrics(label, score, threshold=0.5)
    assert {name for name, value in found.items() if np.isnan(value)} == undefined


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("only", [0, 1])
def test_weighted_averages_of_one_class_are_those_of_that_class(only: int) -> None:
    score = [0.2, 0.7, 0.9]
    found = cell_metrics([only] * 3, score, threshold=0.5)
    assert found["recall_weighted"] == found["accuracy"] == pytest.approx([1 / 3, 2 / 3][only])
    assert found["precision_weighted"] == 1
    assert found["f1_weighted"] == pytest.approx(found[["f1_uninfected", "f1"][only]])


def test_perfect_scores_are_exactly_perfect() -> None:
    found = cell_metrics([0, 0, 1, 1, 1], [0.1, 0.2, 0.7, 0.8, 0.9], threshold=0.5)
    for name in ("accuracy", "f1", "f1_weighted", "matthews_correlation", "roc_auc", "average_precision"):
        assert found[name] == 1


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7, 0.9])
def test_a_float32_score_reaches_the_threshold_that_it_is_written_as(threshold: float) -> None:
    score = np.array([threshold], dtype=np.float32)
    assert cell_metrics([1], score, threshold=threshold)["n_true_positive"] == 1


@settings(deadline=None)
@given(CELLS, st.randoms())
def test_metrics_do_not_depend_on_row_order(cells: list[tuple[int, float]], random: object) -> None:
    shuffled = list(cells)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = (cell_metrics(*arrays(rows), threshold=0.5) for rows in (cells, shuffled))
    np.testing.assert_array_equal(list(one.values()), list(other.values()))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), TIED_SCORES, st.integers(0, 3)), min_size=1, max_size=40),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.integers(0, 3),
)
def test_weighting_a_patient_equals_repeating_its_cells(
    cells: list[tuple[int, float, int]], weights: list[int], left_out: int
) -> None:
    label, score, patient = (np.array(column) for column in zip(*cells, strict=True))
    patient = np.unique(patient, return_inverse=True)[1]
    weight = np.array(weights)[: patient.max() + 1]
    if patient.max() > 0 and left_out <= patient.max():
        weight[left_out] = 0
    table = metrics.tabulate(label, score, patient, 0.5)
    weighted = metrics.weighted_metrics(table, [weight])
    times = weight[patient]
    repeated = cell_metrics(np.repeat(label, times), np.repeat(score, times), threshold=0.5)
    assert {name: float(value[0]) for name, value in weighted.items()} == pytest.approx(
        repeated, abs=1e-12, nan_ok=True
    )


@pytest.mark.parametrize(
    "label",
    [
        [False, True],
        pd.Series([0, 1], dtype="Int8"),
        pd.Series([0, 1], dtype="int8[pyarrow]"),
        pd.Series([0.0, 1.0], index=[7, 7]),
    ],
)
def test_labels_of_any_type_that_holds_0_and_1_are_taken(label: object) -> None:
    assert cell_metrics(label, [0.1, 0.9], threshold=0.5)["accuracy"] == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("label", "score", "message"),
    [
        ([], [], "no cells"),
        ([0], [0.1, 0.2], "1 rows of label, 2 rows of score"),
        ([0, 2, 3], [0.1, 0.2, 0.3], r"label of row 1 is 2 \(2 of 3 rows .* 0 \(uninfected\) or 1"),
        ([0, None], [0.1, 0.2], "label of row 1 is nan"),
        (pd.Series([0, None], dtype="Int8"), [0.1, 0.2], "label of row 1 is <NA>"),
        (["uninfected", "parasitized"], [0.1, 0.2], "label of row 0 is uninfected"),
        ([0, 1], [0.1, np.nan], r"score of row 1 is nan .* 0\.\.1"),
        ([0, 1], [0.1, 1.5], r"score of row 1 is 1\.5"),
        ([0, 1], [-0.1, 0.5], r"score of row 0 is -0\.1"),
        ([0, 1], [[0.1], [0.5]], r"score has shape \(2, 1\)"),
    ],
)
def test_bad_cells_are_named(label: object, score: object, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        cell_metrics(label, score, threshold=0.5)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match=message):
        metrics.roc_curve(label, score)  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_outside_the_scores_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"threshold is .*: allowed is 0\.\.1"):
        cell_metrics([0, 1], [0.1, 0.9], threshold=threshold)


@settings(deadline=None)
@given(CELLS.filter(lambda cells: len({label for label, _ in cells}) == 2))
def test_curves_equal_those_of_scikit_learn(cells: list[tuple[int, float]]) -> None:
    label, score = arrays(cells)
    roc = metrics.roc_curve(label, score)
    false_positive_rate, sensitivity, threshold = reference.roc_curve(label, score, drop_intermediate=False)
    np.testing.assert_allclose(roc["false_positive_rate"], false_positive_rate)
    np.testing.assert_allclose(roc["sensitivity"], sensitivity)
    np.testing.assert_array_equal(roc["threshold"], threshold)

    curve = metrics.precision_recall_curve(label, score)
    precision, recall, threshold = reference.precision_recall_curve(label, score)
    np.testing.assert_allclose(curve["precision"], precision[::-1])
    np.testing.assert_allclose(curve["sensitivity"], recall[::-1])
    np.testing.assert_array_equal(curve["threshold"], [np.inf, *threshold[::-1]])

    calibration = metrics.calibration_curve(label, score, n_bins=10)
    observed, mean_score = sklearn.calibration.calibration_curve(label, score, n_bins=10)
    np.testing.assert_allclose(calibration["observed_share"], observed)
    np.testing.assert_allclose(calibration["mean_score"], mean_score, rtol=1e-6)
    assert calibration["n"].sum() == len(label)
    assert (calibration["mean_score"] <= calibration["score_high"] + 1e-9).all()


def test_a_long_curve_keeps_its_shape_in_a_thousand_points() -> None:
    label, score = many_cells(30_000)
    for curve, whole in (
        (metrics.roc_curve, metrics._operating_points(label, score)),
        (metrics.precision_recall_curve, metrics._operating_points(label, score)),
    ):
        thinned = curve(label, score)
        threshold, true_positives, false_positives = whole
        assert len(threshold) > 20_000
        assert 900 < len(thinned) <= 1000
        assert thinned["threshold"].is_monotonic_decreasing
        assert np.isin(thinned["threshold"], threshold).all()
        assert thinned["threshold"].iloc[[0, -1]].tolist() == [np.inf, threshold[-1]]
        # Each point that is left out, against the point that follows it in what is kept.
        kept = np.searchsorted(-thinned["threshold"].to_numpy(), -threshold)
        sensitivity = true_positives / label.sum()
        assert np.abs(thinned["sensitivity"].to_numpy()[kept] - sensitivity).max() < 0.003
        if curve is metrics.roc_curve:
            false_positive_rate = false_positives / (label == 0).sum()
            assert np.abs(thinned["false_positive_rate"].to_numpy()[kept] - false_positive_rate).max() < 0.003


def test_a_curve_that_is_undefined_has_no_rows() -> None:
    assert metrics.roc_curve([1, 1], [0.1, 0.2]).empty
    assert metrics.roc_curve([0, 0], [0.1, 0.2]).empty
    assert metrics.precision_recall_curve([0, 0], [0.1, 0.2]).empty
    assert list(metrics.roc_curve([0], [0.1])) == ["threshold", "false_positive_rate", "sensitivity"]
