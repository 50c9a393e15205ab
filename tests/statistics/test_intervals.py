"""Intervals resample patients, cover what they promise, and are NaN where the data cannot carry one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from malaria_ray.errors import ConfigError, DatasetError
from malaria_ray.statistics.intervals import (
    _degrees_of_freedom,
    bootstrap_over_patients,
    paired_bootstrap_over_patients,
    wilson,
)
from malaria_ray.statistics.metrics import COUNTS, cell_metrics

Cells = tuple[np.ndarray, np.ndarray, np.ndarray]


def screened(n_patients: int, cells_per_patient: int, seed: int = 0) -> Cells:
    """Labels, float32 scores that shift from patient to patient, patient ids. All patients have both labels."""
    rng = np.random.default_rng([seed, n_patients])
    patient = np.repeat([f"P{number}" for number in range(n_patients)], cells_per_patient)
    label = np.tile(np.arange(cells_per_patient) % 2, n_patients)
    shift = np.repeat(rng.normal(0, 0.7, n_patients), cells_per_patient)
    score = 1 / (1 + np.exp(-rng.normal(3 * label - 1.5 + shift, 1)))
    return label, score.astype(np.float32), patient


def parasitized_cells(n_patients: int, mean: float, correlation: float, cells_per_patient: int, seed: int) -> Cells:
    """Parasitized cells called or missed at a rate of each patient's own.

    The rates follow a beta distribution with that mean and that `correlation` of cells within a patient; the
    numbers of cells are log-normal with mean `cells_per_patient`. The true sensitivity is `mean`.
    """
    rng = np.random.default_rng(seed)
    spread = 1 / correlation - 1
    rate = rng.beta(mean * spread, (1 - mean) * spread, n_patients)
    n_cells = np.ceil(cells_per_patient * rng.lognormal(-0.125, 0.5, n_patients)).astype(int)
    patient = np.repeat(np.arange(n_patients), n_cells)
    called = rng.random(len(patient)) < rate[patient]
    return np.ones(len(patient), dtype=int), called.astype(np.float32), patient


def covered_share(
    n_sets: int, n_resamples: int, n_patients: int, mean: float, correlation: float, cells_per_patient: int
) -> float:
    n_covered = 0
    for seed in range(n_sets):
        cells = parasitized_cells(n_patients, mean, correlation, cells_per_patient, seed)
        intervals = bootstrap_over_patients(*cells, threshold=0.5, seed=seed, n_resamples=n_resamples)
        low, high = intervals["sensitivity"]
        n_covered += low <= mean <= high
    return n_covered / n_sets


def test_intervals_cover_a_known_sensitivity() -> None:
    """Forty patients whose cells are alike within a patient: 95 ± 3 % of the intervals hold the truth."""
    share = covered_share(300, n_resamples=100, n_patients=40, mean=0.9, correlation=0.05, cells_per_patient=30)
    assert 0.92 <= share <= 0.98


def screening(n_patients: int, cells_per_patient: int, seed: int) -> Cells:
    """Cells of patients of whom some are infected, their scores shifted by what is each patient's own."""
    rng = np.random.default_rng(seed)
    n_cells = np.ceil(cells_per_patient * rng.lognormal(-0.125, 0.5, n_patients)).astype(int)
    patient = np.repeat(np.arange(n_patients), n_cells)
    parasitized = np.where(rng.random(n_patients) < 0.7, rng.beta(6, 4, n_patients), 0)
    label = (rng.random(len(patient)) < parasitized[patient]).astype(int)
    shift = rng.normal(0, 0.5, n_patients)[patient]
    score = 1 / (1 + np.exp(-rng.normal(2 * (2 * label - 1) + shift, 1.2)))
    return label, score.astype(np.float32), patient


def test_intervals_of_every_metric_cover_its_true_value() -> None:
    """95 ± 2 % of the intervals hold what 20,000 patients have."""
    truth = cell_metrics(*screening(20_000, 60, seed=999)[:2], threshold=0.5)
    n_sets = 2000
    n_covered = dict.fromkeys(truth.keys() - set(COUNTS), 0)
    for seed in range(n_sets):
        intervals = bootstrap_over_patients(*screening(40, 60, seed), threshold=0.5, seed=seed, n_resamples=200)
        for name in n_covered:
            n_covered[name] += intervals[name][0] <= truth[name] <= intervals[name][1]
    hangs_on_one_cell = n_covered.pop("sensitivity_at_specificity_0.999")
    assert hangs_on_one_cell / n_sets > 0.85
    shares = {name: n / n_sets for name, n in n_covered.items()}
    assert {name: share for name, share in shares.items() if not 0.93 <= share <= 0.97} == {}


def of_two_models(n_patients: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Label, the scores of two models and patient: what is hard for one is hard for the other."""
    label, score, patient = screening(n_patients, 60, seed)
    rng = np.random.default_rng([seed, 1])
    own = rng.normal(0, 0.3, n_patients)[patient] + rng.normal(0, 0.7, len(label))
    logit = np.log(score) - np.log1p(-score)
    return label, score, (1 / (1 + np.exp(-(logit * 1.1 + own)))).astype(np.float32), patient


def test_paired_intervals_cover_the_true_differences() -> None:
    """95 ± 3.5 % of those of 400 sets hold what 20,000 patients have."""
    label, score, other_score, _ = of_two_models(20_000, seed=999)
    values, others = (cell_metrics(label, of_model, threshold=0.5) for of_model in (score, other_score))
    n_sets, shown = 400, ("accuracy", "sensitivity", "specificity", "f1", "roc_auc", "brier_score")
    n_covered = dict.fromkeys(shown, 0)
    for seed in range(n_sets):
        label, score, other_score, patient = of_two_models(40, seed)
        intervals = paired_bootstrap_over_patients(
            label, other_score, score, patient, threshold=0.5, other_threshold=0.5, seed=seed, n_resamples=100
        )
        for name in shown:
            n_covered[name] += intervals[name][0] <= others[name] - values[name] <= intervals[name][1]
    shares = {name: n / n_sets for name, n in n_covered.items()}
    assert {name: share for name, share in shares.items() if not 0.915 <= share <= 0.985} == {}


def test_the_interval_is_a_t_interval_on_the_logit() -> None:
    label, score, patient = screened(n_patients=12, cells_per_patient=10)
    called = np.array([(score[label == 1] >= 0.5)[patient[label == 1] == one].sum() for one in np.unique(patient)])
    resampled = [
        called[np.random.default_rng([3, resample]).integers(12, size=12)].sum() / 60 for resample in range(200)
    ]
    value = called.sum() / 60
    error = np.std(resampled, ddof=1) * np.sqrt(12 / 11)
    square = (called - called.mean()) ** 2  # all have 5 parasitized cells
    degrees = 2 * square.sum() ** 2 / (square**2).sum()
    assert degrees < 11
    half = stats.t.ppf(0.95, degrees) * error / (value * (1 - value))
    logit = np.log(value / (1 - value))
    expected = 1 / (1 + np.exp(-(logit + np.array([-half, half]))))
    intervals = bootstrap_over_patients(label, score, patient, threshold=0.5, seed=3, n_resamples=200, confidence=0.9)
    assert intervals["sensitivity"] == pytest.approx(tuple(expected), rel=2e-2)  # influences are estimated


def test_one_patient_with_all_the_influence_leaves_few_degrees_of_freedom() -> None:
    assert _degrees_of_freedom(np.array([1.0] * 10 + [-1.0] * 10)) == 40
    assert _degrees_of_freedom(np.array([4.0] + [0.0] * 19)) == 2
    normal = np.random.default_rng(0).normal(size=100_000)
    assert _degrees_of_freedom(normal) == pytest.approx(66_667, rel=0.03)


def test_every_rate_lies_inside_its_interval_and_its_range() -> None:
    cells = screened(n_patients=30, cells_per_patient=60)
    values = cell_metrics(*cells[:2], threshold=0.5)
    intervals = bootstrap_over_patients(*cells, threshold=0.5, seed=0, n_resamples=200)
    assert intervals.keys() == values.keys()
    for name, (low, high) in intervals.items():
        if name in COUNTS:
            assert np.isnan([low, high]).all(), name
        else:
            assert 0 < low < values[name] < high < 1, name


def test_intervals_do_not_depend_on_row_order() -> None:
    cells = screened(n_patients=7, cells_per_patient=20)
    order = np.random.default_rng(5).permutation(len(cells[0]))
    one = bootstrap_over_patients(*cells, threshold=0.5, seed=1, n_resamples=50)
    other = bootstrap_over_patients(*(column[order] for column in cells), threshold=0.5, seed=1, n_resamples=50)
    np.testing.assert_array_equal(list(one.values()), list(other.values()))


def test_the_seed_decides() -> None:
    cells = screened(n_patients=7, cells_per_patient=20)
    first, again, other = (
        bootstrap_over_patients(*cells, threshold=0.5, seed=seed, n_resamples=50)["roc_auc"] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_more_cells_of_the_same_patients_are_no_more_evidence() -> None:
    """Each cell five times over: an interval over cells would shrink by √5."""
    cells = screened(n_patients=20, cells_per_patient=20)
    once = bootstrap_over_patients(*cells, threshold=0.5, seed=0, n_resamples=100)
    often = bootstrap_over_patients(*(np.repeat(column, 5) for column in cells), threshold=0.5, seed=0, n_resamples=100)
    for name in (
        "sensitivity",
        "specificity",
        "precision",
        "f1",
        "roc_auc",
        "average_precision",
        "brier_score",
    ):
        assert once[name] == pytest.approx(often[name]), name


def test_more_patients_are_more_evidence() -> None:
    widths = []
    for n_patients in (20, 320):
        cells = screened(n_patients, cells_per_patient=20)
        low, high = bootstrap_over_patients(*cells, threshold=0.5, seed=0, n_resamples=100)["roc_auc"]
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


HALF = [0.1, 0.9, 0.2, 0.4]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("label", "score", "patient", "with_interval"),
    [
        ([0, 1, 0, 1], HALF, ["P1", "P1", "P1", "P1"], set()),
        ([0, 1, 0, 1], HALF, ["P1", "P1", "P2", None], set()),
        ([0, 1, 0, 1], HALF, [None, None, None, None], set()),
        # Both patients have one of two parasitized cells called: no resample differs.
        ([1, 1, 1, 1], [0.9, 0.1, 0.9, 0.1], ["P1", "P1", "P2", "P2"], set()),
        # All correct: the bootstrap cannot say how far from 1 the truth may be.
        ([0, 1, 0, 1], [0.1, 0.9, 0.1, 0.9], ["P1", "P1", "P2", "P2"], set()),
        # One patient has all the uninfected cells: nothing is known about others' specificity.
        (
            [0, 0, 1, 1, 1, 1],
            [0.1, 0.8, 0.9, 0.3, 0.9, 0.9],
            ["C1", "C1", "P1", "P1", "P2", "P2"],
            # Resamples of C1 alone are one in 27, few enough.
            {"sensitivity"},
        ),
    ],
    ids=[
        "one patient",
        "a null patient",
        "all null",
        "patients alike",
        "all correct",
        "class in one patient",
    ],
)
def test_no_interval_where_the_data_cannot_carry_one(
    label: list[int], score: list[float], patient: list[str | None], with_interval: set[str]
) -> None:
    intervals = bootstrap_over_patients(label, score, patient, threshold=0.5, seed=0, n_resamples=300)
    assert {name for name, ends in intervals.items() if not np.isnan(ends).any()} == with_interval
    assert all(np.isnan(ends).all() for name, ends in intervals.items() if name not in with_interval)


def test_no_interval_where_many_resamples_leave_the_metric_undefined() -> None:
    """Only one patient of four has cells called parasitized: a third of the resamples has no precision."""
    label = [0, 1] * 4
    score = [0.8, 0.9] + [0.2, 0.3] * 3
    patient = np.repeat(["P1", "P2", "P3", "P4"], 2)
    intervals = bootstrap_over_patients(label, score, patient, threshold=0.5, seed=0, n_resamples=300)
    assert np.isnan(intervals["precision"]).all()
    assert not np.isnan(intervals["sensitivity"]).any()


def test_a_paired_interval_is_narrower_than_two_models_apart() -> None:
    label, score, patient = screened(n_patients=40, cells_per_patient=50)
    rng = np.random.default_rng(8)
    worse = np.clip(score + rng.normal(0, 0.2, len(score)), 0, 1).astype(np.float32)
    flags = {"threshold": 0.5, "seed": 0, "n_resamples": 200}
    paired = paired_bootstrap_over_patients(label, score, worse, patient, other_threshold=0.5, **flags)
    apart = [bootstrap_over_patients(label, one, patient, **flags) for one in (score, worse)]
    for name in ("accuracy", "roc_auc", "average_precision"):
        low, high = paired[name]
        difference = np.subtract(*[cell_metrics(label, one, threshold=0.5)[name] for one in (score, worse)])
        assert 0 < low < difference < high, name
        assert high - low < sum(np.diff(one[name])[0] for one in apart) / 1.5, name
    swapped = paired_bootstrap_over_patients(label, worse, score, patient, other_threshold=0.5, **flags)
    assert swapped["roc_auc"] == pytest.approx((-paired["roc_auc"][1], -paired["roc_auc"][0]))


@pytest.mark.filterwarnings("error")
def test_paired_intervals_are_nan_where_models_agree_or_patients_are_unknown() -> None:
    label, score, patient = screened(n_patients=6, cells_per_patient=10)
    flags = {"threshold": 0.5, "other_threshold": 0.5, "seed": 0, "n_resamples": 50}
    same = paired_bootstrap_over_patients(label, score, score, patient, **flags)
    unknown = paired_bootstrap_over_patients(label, score, 1 - score, [None] * len(label), **flags)
    for intervals in (same, unknown):
        assert np.isnan(list(intervals.values())).all()


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(0, 50), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_equals_scipy(k: int, more: int, confidence: float) -> None:
    low, high = wilson(k, k + more, confidence)
    if k + more == 0:
        assert np.isnan([low, high]).all()
        return
    expected = stats.binomtest(k, k + more).proportion_ci(confidence, method="wilson")
    assert (float(low), float(high)) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= k / (k + more) <= high <= 1


@pytest.mark.filterwarnings("error")
def test_wilson_takes_arrays() -> None:
    low, high = wilson([0, 5, 10, 0], [10, 10, 10, 0])
    np.testing.assert_allclose(low, [0, 0.2366, 0.7225, np.nan], atol=5e-5)
    np.testing.assert_allclose(high, [0.2775, 0.7634, 1, np.nan], atol=5e-5)


@pytest.mark.parametrize(("k", "n"), [(-1, 10), (11, 10), ([1, 3], [2, 2]), (np.nan, 2)])
def test_wilson_refuses_counts_out_of_range(k: object, n: object) -> None:
    with pytest.raises(DatasetError, match="allowed is 0 <= k <= n"):
        wilson(k, n)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"n_resamples": 1}, "n_resamples is 1: allowed is 2 or more"),
        ({"confidence": 95}, "confidence is 95: allowed is between 0 and 1"),
        ({"threshold": 2}, r"threshold is 2: allowed is 0\.\.1"),
    ],
)
def test_flags_out_of_range_are_refused(flag: dict[str, float], message: str) -> None:
    flags = {"threshold": 0.5, "seed": 0} | flag
    with pytest.raises(ConfigError, match=message):
        bootstrap_over_patients(*screened(3, 4), **flags)  # type: ignore[arg-type]


def test_a_patient_column_of_another_length_is_refused() -> None:
    with pytest.raises(DatasetError, match="2 rows of label, 1 rows of patient"):
        bootstrap_over_patients([0, 1], [0.1, 0.9], ["P1"], threshold=0.5, seed=0)
