"""Corrected fractions cover the truth, calls keep their specificity, limits of detection are where they say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rates import of_beta
from scipy import stats

from malaria_ray.errors import DatasetError
from malaria_ray.schema import Call
from malaria_ray.statistics.calls import (
    call_threshold,
    corrected_fraction,
    limit_of_detection,
    n_more_cells,
    patient_call,
)
from malaria_ray.statistics.intervals import wilson
from malaria_ray.statistics.rates import ErrorRates, PatientRate, fit_rate

FALSE_POSITIVE, FALSE_NEGATIVE = (0.02, 0.03), (0.06, 0.02)
"""Mean rate and correlation of the cells within a patient, of the synthetic patients below."""


def rate(mean: float, correlation: float) -> PatientRate:
    size = 1 / correlation - 1
    return of_beta(mean * size, (1 - mean) * size)


def known(fp: float, fn: float) -> ErrorRates:
    """Rates without any spread."""
    return ErrorRates(false_positive=rate(fp, 1e-9), false_negative=rate(fn, 1e-9), threshold=0.5)


SPREAD = ErrorRates(false_positive=rate(*FALSE_POSITIVE), false_negative=rate(*FALSE_NEGATIVE), threshold=0.5)


def drawn(rng: np.random.Generator, mean: float, correlation: float, n: int) -> np.ndarray:
    size = 1 / correlation - 1
    return rng.beta(mean * size, (1 - mean) * size, n)


def counted(rng: np.random.Generator, fraction: np.ndarray, n_cells: int) -> np.ndarray:
    """Cells called parasitized, of synthetic patients with these true fractions and rates of error of their own."""
    fp, fn = drawn(rng, *FALSE_POSITIVE, len(fraction)), drawn(rng, *FALSE_NEGATIVE, len(fraction))
    return rng.binomial(n_cells, fraction * (1 - fn) + (1 - fraction) * fp)


def learnt(rng: np.random.Generator, n_patients: int, n_cells: int) -> ErrorRates:
    """Rates of error as a run has them: from so many validation patients with so many cells of each class."""
    false_positive = fit_rate(rng.binomial(n_cells, drawn(rng, *FALSE_POSITIVE, n_patients)), n_cells)
    false_negative = fit_rate(rng.binomial(n_cells, drawn(rng, *FALSE_NEGATIVE, n_patients)), n_cells)
    return ErrorRates(false_positive=false_positive, false_negative=false_negative, threshold=0.5)


def coverage(fraction: float, n_cells: int, n_validation_patients: int, n_worlds: int = 25) -> float:
    """Share of synthetic patients whose interval holds the truth, over validation sets drawn anew."""
    rng = np.random.default_rng([n_validation_patients, n_cells])
    held = []
    for _ in range(n_worlds):
        rates = learnt(rng, n_validation_patients, 60)
        k = counted(rng, np.full(80, fraction), n_cells)
        _, low, high = corrected_fraction(k, n_cells, rates)
        held.append(np.mean((low <= fraction) & (fraction <= high)))
    return float(np.mean(held))


@pytest.mark.parametrize(
    ("fraction", "n_cells", "n_validation_patients"),
    [(0.05, 200, 30), (0.1, 60, 30), (0.3, 130, 30), (0.5, 130, 30), (0.05, 500, 30), (0.3, 130, 100)],
)
def test_intervals_of_corrected_fractions_cover_what_they_promise(
    fraction: float, n_cells: int, n_validation_patients: int
) -> None:
    assert coverage(fraction, n_cells, n_validation_patients) == pytest.approx(0.95, abs=0.02)


def test_intervals_of_ten_cells_cover_more_rather_than_less() -> None:
    assert 0.93 <= coverage(0.1, 10, 30) <= 0.99  # there are but eleven counts


def test_few_validation_patients_make_intervals_wider_rather_than_too_narrow() -> None:
    assert 0.94 <= coverage(0.3, 130, 10) <= 0.99


def test_the_interval_of_an_uninfected_patient_begins_at_0() -> None:
    # One end only can miss.
    assert 0.955 <= coverage(0.0, 130, 30) <= 0.995


def test_corrected_fractions_are_right_on_average_where_raw_ones_are_not() -> None:
    k = counted(np.random.default_rng(0), np.full(2000, 0.3), 100)
    value, _, _ = corrected_fraction(k, 100, SPREAD)
    assert value.mean() == pytest.approx(0.3, abs=0.005)
    assert (k / 100).mean() == pytest.approx(0.3 * 0.94 + 0.7 * 0.02, abs=0.005)


def test_known_rates_give_the_interval_by_hand() -> None:
    # 30 of 100 called at 5 % false positives and 10 % false negatives: (0.30 - 0.05) / (1 - 0.05 - 0.10).
    value, low, high = corrected_fraction(30, 100, known(0.05, 0.1))
    assert value[0] == pytest.approx(0.25 / 0.85, abs=1e-5)
    for end, level in ((low[0], 0.025), (high[0], 0.975)):
        called = end * 0.9 + (1 - end) * 0.05
        mid_p = stats.binom.sf(30, 100, called) + stats.binom.pmf(30, 100, called) / 2
        assert mid_p == pytest.approx(level, abs=1e-4)


def test_many_cells_without_spread_agree_with_lang_and_reiczigel() -> None:
    k, n, n_sensitivity, n_specificity, sensitivity, specificity = 300, 1000, 800, 900, 0.92, 0.95
    rates = ErrorRates(
        false_positive=of_beta(45.5, 855.5),
        false_negative=of_beta(64.5, 736.5),
        threshold=0.5,
    )
    _, low, high = corrected_fraction(k, n, rates)
    # Lang & Reiczigel 2014, equations 4, 6, 7, 15 to 17.
    z = 1.959964
    se = (n_sensitivity * sensitivity + 1) / (n_sensitivity + 2)
    sp = (n_specificity * specificity + 1) / (n_specificity + 2)
    n_, share = n + z**2, (k + z**2 / 2) / (n + z**2)
    p = (share + sp - 1) / (se + sp - 1)
    se_var, sp_var = se * (1 - se) / (n_sensitivity + 2), sp * (1 - sp) / (n_specificity + 2)
    variance = (share * (1 - share) / n_ + p**2 * se_var + (1 - p) ** 2 * sp_var) / (se + sp - 1) ** 2
    shift = 2 * z**2 * (p * se_var - (1 - p) * sp_var)
    expected = p + shift + np.array([-1, 1]) * z * np.sqrt(variance)
    np.testing.assert_allclose([low[0], high[0]], expected, atol=0.002)


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=40)
@given(st.integers(0, 300), st.integers(1, 300), st.floats(0.001, 0.4), st.floats(0.001, 0.4), st.floats(0.001, 0.5))
def test_a_corrected_fraction_lies_in_its_interval(k: int, n: int, fp: float, fn: float, correlation: float) -> None:
    rates = ErrorRates(false_positive=rate(fp, correlation), false_negative=rate(fn, correlation), threshold=0.5)
    value, low, high = corrected_fraction(min(k, n), n, rates)
    assert 0 <= low[0] <= value[0] <= high[0] <= 1


def test_more_called_cells_never_lower_the_interval() -> None:
    value, low, high = corrected_fraction(np.arange(51), 50, SPREAD)
    assert np.all(np.diff(value) >= 0)
    assert np.all(np.diff(low) >= 0)
    assert np.all(np.diff(high) >= 0)
    assert (low[0], high[-1]) == (0, 1)


@pytest.mark.filterwarnings("error")
def test_no_cells_and_a_useless_model_have_no_fraction() -> None:
    assert np.isnan(corrected_fraction([0, 3], [0, 10], SPREAD)[0]).tolist() == [True, False]
    assert np.isnan(corrected_fraction(3, 10, known(0.6, 0.5))).all()
    assert corrected_fraction([], [], SPREAD)[0].shape == (0,)


@pytest.mark.parametrize(
    ("k", "n", "expected"),
    [
        (0, 10, Call.undecided),  # ten cells show neither health
        (10, 10, Call.positive),
        (1, 10, Call.undecided),  # nor a low fraction
        (0, 0, Call.undecided),
        (0, 300, Call.negative),
        (2, 300, Call.negative),
        (20, 300, Call.undecided),  # one uninfected patient in twenty has a rate as high
        (45, 300, Call.positive),
        (0, 1, Call.undecided),
    ],
)
def test_calls(k: int, n: int, expected: Call) -> None:
    assert 0.06 < call_threshold(SPREAD) < 0.08
    assert patient_call(k, n, SPREAD).tolist() == [expected]


@given(st.integers(0, 500), st.integers(1, 500))
def test_a_call_is_where_wilsons_interval_lies(k: int, n: int) -> None:
    k, threshold = min(k, n), call_threshold(SPREAD)
    low, high = wilson(k, n)
    # Rates as spread as these keep the promise of the test below by that interval alone.
    expected = Call.positive if low > threshold else Call.negative if high < threshold else Call.undecided
    assert patient_call(k, n, SPREAD)[0] == expected


@pytest.mark.parametrize("n_cells", [20, 130, 10_000])
def test_uninfected_patients_are_called_positive_no_oftener_than_promised(n_cells: int) -> None:
    k = counted(np.random.default_rng(0), np.zeros(20_000), n_cells)
    assert np.mean(patient_call(k, n_cells, SPREAD) == Call.positive) <= 0.052


@pytest.mark.parametrize(("alpha", "beta"), [(20, 980), (200, 9800), (500, 9500), (2, 98), (0.5, 50)])
def test_nor_of_any_number_of_cells(alpha: float, beta: float) -> None:
    """By Wilson's interval alone one in seven was, of eight cells at a rate of 2 % that hardly differs."""
    rates = ErrorRates(false_positive=of_beta(alpha, beta), false_negative=rate(*FALSE_NEGATIVE), threshold=0.5)
    for n in (*range(1, 100), 300, 1000):
        k = np.arange(n + 1)
        is_called = patient_call(k, n, rates) == Call.positive
        assert stats.betabinom.pmf(k[is_called], n, alpha, beta).sum() <= 0.0505, n
        assert not np.any(np.diff(is_called.astype(int)) < 0)  # never fewer called cells than of one not called


def test_the_cells_that_a_share_above_the_threshold_needs_make_it_positive() -> None:
    rates = ErrorRates(false_positive=of_beta(200, 9800), false_negative=rate(*FALSE_NEGATIVE), threshold=0.5)
    k, n = np.array([1, 1, 2]), np.array([6, 8, 25])
    assert (wilson(k, n)[0] > call_threshold(rates)).any()  # so it is not for Wilson's interval
    assert (patient_call(k, n, rates) == Call.undecided).all()
    total = n + n_more_cells(k, n, rates).to_numpy(np.int64)
    assert (patient_call(np.ceil(k / n * total).astype(int), total, rates) == Call.positive).all()


@pytest.mark.parametrize("n_cells", [30, 130, 2000])
def test_patients_at_the_limit_of_detection_are_found_as_often_as_promised(n_cells: int) -> None:
    limit = limit_of_detection(n_cells, SPREAD)[0]
    k = counted(np.random.default_rng(0), np.full(5000, limit), n_cells)
    assert np.mean(patient_call(k, n_cells, SPREAD) == Call.positive) == pytest.approx(0.95, abs=0.01)


def test_more_cells_lower_the_limit_of_detection_as_far_as_the_noise_floor() -> None:
    limits = limit_of_detection([1, 10, 100, 1000, 10**5, 10**6], SPREAD)
    assert np.isnan(limits[0])  # one cell proves nothing
    assert np.all(np.diff(limits[1:]) < 0)
    # Of so many cells the share called is the patient's own, and the average patient's must reach the threshold.
    assert limits[-1] > (call_threshold(SPREAD) - 0.02) / 0.92
    assert limits[-2] - limits[-1] < 0.005


def test_the_cells_that_an_undecided_patient_needs_decide() -> None:
    k, n = np.array([0, 1, 4, 12, 20, 300]), np.array([10, 20, 60, 100, 300, 300])
    more = n_more_cells(k, n, SPREAD)
    assert more.tolist()[-1] == 0
    undecided = patient_call(k, n, SPREAD) == Call.undecided
    assert (more[undecided] > 0).all()

    def are_enough(total: np.ndarray) -> np.ndarray:
        """For the share itself and for the whole cells next to it."""
        low, high = wilson(k / n * total, total)
        is_beyond = (low > call_threshold(SPREAD)) | (high < call_threshold(SPREAD))
        return is_beyond & (patient_call(np.rint(k / n * total).astype(int), total, SPREAD) != Call.undecided)

    total = n + more.to_numpy(np.int64)
    assert are_enough(total)[undecided].all()
    assert not are_enough(total - 1)[undecided].any()


@given(st.integers(0, 60), st.integers(1, 200), st.sampled_from([SPREAD, known(0.25, 0.1)]))
def test_the_share_in_whole_cells_is_decided_by_the_cells_that_it_needs(k: int, n: int, rates: ErrorRates) -> None:
    k = min(k, n)
    more = n_more_cells(k, n, rates)[0]
    if not pd.isna(more):
        assert patient_call(round(k / n * (n + more)), n + more, rates)[0] != Call.undecided


POOR = ErrorRates(  # as learnt from 37 cells
    false_positive=of_beta(0.62, 1.67),
    false_negative=of_beta(1.71, 1.19),
    threshold=0.5,
)


@pytest.mark.filterwarnings("error")
def test_a_model_that_finds_no_infection_for_sure_calls_nobody_negative() -> None:
    assert np.isnan(limit_of_detection([2, 10_000], POOR)).all()
    assert patient_call([0, 0], [2, 10_000], POOR).tolist() == [Call.undecided] * 2
    assert n_more_cells([0, 0], [2, 10_000], POOR).isna().all()


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([SPREAD, POOR, known(0.2, 0.3)]))
def test_a_negative_call_has_a_limit_of_detection(k: int, n: int, rates: ErrorRates) -> None:
    if patient_call(min(k, n), n, rates)[0] == Call.negative:
        assert not np.isnan(limit_of_detection(n, rates)[0])


def test_few_cells_of_a_middling_model_are_undecided_until_there_are_enough() -> None:
    rates = known(0.5, 0.05)  # of two cells none is called: below 0.5 for sure by no means
    for n in (1, 2, 4, 6):
        more = n_more_cells([0], [n], rates)[0]
        assert patient_call(0, n, rates)[0] == Call.undecided
        assert patient_call(0, n + more, rates)[0] == Call.negative
        assert patient_call(0, n + more - 1, rates)[0] == Call.undecided


def test_undecided_patients_always_need_more_cells_and_are_decided_by_them() -> None:
    """Of this model 37 cells are enough to call a patient negative, 38 are not."""
    rates = ErrorRates(false_positive=of_beta(8, 24), false_negative=of_beta(0.4, 3), threshold=0.5)
    n = np.arange(1, 400)
    undecided = patient_call(0 * n, n, rates) == Call.undecided
    assert (np.diff(undecided.astype(int)) > 0).any()  # where one cell more undoes a call
    more = n_more_cells(0 * n, n, rates)
    assert ((more > 0) == undecided).all()
    assert (patient_call(0 * n, n + more.to_numpy(np.int64), rates) == Call.negative).all()


@pytest.mark.filterwarnings("error")
def test_a_share_on_the_threshold_is_never_decided() -> None:
    rates = known(0.25, 0.1)
    assert call_threshold(rates) == pytest.approx(0.25, abs=1e-4)
    assert n_more_cells([25_000], [100_000], rates).isna().all()
    assert n_more_cells([0], [0], rates).tolist() == [12]  # cells without a parasite that show health


@pytest.mark.parametrize(("k", "n"), [(-1, 10), (11, 10)])
def test_counts_out_of_range_are_refused(k: int, n: int) -> None:
    for function in (corrected_fraction, patient_call, n_more_cells):
        with pytest.raises(DatasetError, match=f"{k} of {n} cells called parasitized"):
            function(k, n, SPREAD)
