"""A new patient's rate of error is predicted as widely as the patients seen allow, and no wider with many."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rates import of_beta
from scipy import stats

from malaria_ray.errors import ConfigError, DatasetError
from malaria_ray.statistics.rates import ErrorRates, check_same_threshold, fit_error_rates, fit_rate


def simulated(n_patients: int, mean: float, correlation: float, n_cells: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """Errors in `n_cells` cells of each patient, whose rates are beta distributed."""
    rng = np.random.default_rng([seed, n_patients])
    size = 1 / correlation - 1
    return rng.binomial(n_cells, rng.beta(mean * size, (1 - mean) * size, n_patients)), n_cells


def test_the_rates_of_many_patients_are_found() -> None:
    rate = fit_rate(*simulated(2000, 0.03, 0.05, 200))
    shares = [0.05, 0.25, 0.5, 0.75, 0.95, 0.99]
    expected = stats.beta.ppf(shares, 0.03 * 19, 0.97 * 19)
    np.testing.assert_allclose(rate.quantile(shares), expected, rtol=0.15)
    assert rate.mean == pytest.approx(0.03, rel=0.08)
    assert (rate.n_patients, rate.n_cells) == (2000, 400_000)


@pytest.mark.parametrize(
    ("n_patients", "mean", "correlation", "within"),
    [
        (5, 0.03, 0.05, (0.94, 0.99)),
        (20, 0.03, 0.05, (0.93, 0.97)),
        (80, 0.03, 0.05, (0.93, 0.97)),
        (50, 0.0005, 0.001, (0.9, 0.98)),  # hardly an error seen
        (20, 0.03, 0.002, (0.94, 0.99)),  # patients all alike
    ],
)
def test_new_patients_lie_below_the_quantile_as_often_as_it_says(
    n_patients: int, mean: float, correlation: float, within: tuple[float, float]
) -> None:
    rng = np.random.default_rng(0)
    size, below = 1 / correlation - 1, []
    for seed in range(40):
        rate = fit_rate(*simulated(n_patients, mean, correlation, 100, seed))
        new = rng.beta(mean * size, (1 - mean) * size, 1000)
        below.append(np.mean(new <= rate.quantile(0.95)))
    assert within[0] <= np.mean(below) <= within[1]


@pytest.mark.parametrize(("n_patients", "n_cells"), [(8, 1000), (20, 100), (50, 130), (50, 10_000)])
def test_cells_without_an_error_leave_about_three_in_all_of_them(n_patients: int, n_cells: int) -> None:
    found = fit_rate([0] * n_patients, [n_cells] * n_patients).quantile(0.95)
    assert found * n_patients * n_cells == pytest.approx(3.5, abs=2)  # the rule of three, and some spread


def test_fewer_patients_leave_more_unknown() -> None:
    # The same share of errors, none of them unlike the others.
    quantiles = [fit_rate([2] * n, [100] * n).quantile(0.95) for n in (1, 3, 10, 100)]
    assert np.all(np.diff(quantiles) < 0)
    assert quantiles[0] > 0.3
    assert quantiles[-1] == pytest.approx(0.025, abs=0.005)


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5000)), min_size=1, max_size=5))
def test_any_counts_give_a_rate_between_0_and_1(counts: list[tuple[int, int]]) -> None:
    errors, right = np.array(counts).T
    if not (errors + right).any():
        return
    rate = fit_rate(errors, errors + right)
    assert 0 < rate.mean < 1
    quantiles = rate.quantile([0, 0.01, 0.5, 0.99, 1])
    assert np.all((quantiles > 0) & (quantiles < 1))
    assert np.all(np.diff(quantiles) >= 0)


def test_a_known_beta_distribution_keeps_its_quantiles() -> None:
    rate = of_beta(2, 50)
    shares = [0.001, 0.05, 0.5, 0.95, 0.999]
    np.testing.assert_allclose(rate.quantile(shares), stats.beta.ppf(shares, 2, 50), rtol=2e-3)
    assert rate.mean == pytest.approx(2 / 52)


@pytest.mark.parametrize(
    ("errors", "cells", "message"),
    [([], [], "no patient with cells"), ([0], [0], "no patient with cells"), ([3], [2], "3 errors of 2 cells")],
)
def test_counts_that_say_nothing_are_refused(errors: list[int], cells: list[int], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        fit_rate(errors, cells)


PATIENT = ["P1", "P1", "P1", "P2", "P2", "C1", "C1", None]
LABEL = [1, 1, 0, 1, 0, 0, 0, 1]
SCORE = [0.9, 0.2, 0.1, 0.5, 0.7, 0.6, 0.1, 0.0]


def test_rates_count_the_cells_of_known_patients() -> None:
    rates = fit_error_rates(PATIENT, LABEL, SCORE, threshold=0.5)
    false_positive, false_negative = rates.false_positive, rates.false_negative
    assert (false_positive.n_errors, false_positive.n_cells, false_positive.n_patients) == (2, 4, 3)
    assert (false_negative.n_errors, false_negative.n_cells, false_negative.n_patients) == (1, 3, 2)


def test_rates_do_not_depend_on_row_order() -> None:
    one = fit_error_rates(PATIENT, LABEL, SCORE, threshold=0.5)
    assert fit_error_rates(PATIENT[::-1], LABEL[::-1], SCORE[::-1], threshold=0.5) == one


def test_rates_survive_json() -> None:
    rates = fit_error_rates(PATIENT, LABEL, SCORE, threshold=0.5)
    assert ErrorRates.from_dict(json.loads(json.dumps(asdict(rates)))) == rates


@pytest.mark.parametrize(
    ("patient", "label", "message"),
    [
        (["P1", "P2"], [0, 0], "no parasitized validation cell of a known patient"),
        (["P1", "P2"], [1, 1], "no uninfected validation cell of a known patient"),
        ([None, "P2"], [0, 1], "no uninfected validation cell of a known patient"),
        ([None, None], [0, 1], "no uninfected validation cell of a known patient"),
    ],
)
def test_rates_that_cannot_be_learnt_are_one_clear_line(
    patient: list[str | None], label: list[int], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        fit_error_rates(patient, label, [0.1, 0.9], threshold=0.5)


def test_rates_of_another_threshold_are_refused() -> None:
    rates = fit_error_rates(PATIENT, LABEL, SCORE, threshold=0.5)
    check_same_threshold(rates, 0.5)
    with pytest.raises(ConfigError, match=r"threshold is 0.9 and the rates of error were learnt at 0.5"):
        check_same_threshold(rates, 0.9)
