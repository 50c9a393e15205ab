"""A temperature makes scores honest and keeps their order; a threshold keeps the specificity it was asked for."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import expit

from malaria_ray.errors import ConfigError, DatasetError
from malaria_ray.statistics import calibration
from malaria_ray.statistics.calibration import Calibration, calibrate, fit_temperature, threshold_for_specificity
from malaria_ray.statistics.metrics import cell_metrics

SCORES = st.one_of(st.floats(0, 1), st.floats(0, 1, width=32), st.sampled_from([0.0, 0.5, 1.0]))


def overconfident(n: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from honest probabilities, and the scores of a model that is `temperature` times too sure."""
    rng = np.random.default_rng([seed, n])
    honest = rng.normal(0, 2, n)
    return (rng.random(n) < expit(honest)).astype(int), expit(honest * temperature).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_of_a_model_that_is_too_sure_is_found(temperature: float) -> None:
    label, score = overconfident(20_000, temperature)
    found = fit_temperature(label, score)
    assert found == pytest.approx(temperature, rel=0.05)
    calibrated = cell_metrics(label, calibrate(score, found), threshold=0.5)
    assert calibrated["expected_calibration_error"] < 0.01


def test_no_other_temperature_is_likelier() -> None:
    label, score = overconfident(500, 3.0)
    best = minimize_scalar(
        lambda t: cell_metrics(label, calibrate(score.astype(float), t), threshold=0.5)["log_loss"],
        bounds=(0.1, 10),
        method="bounded",
        options={"xatol": 1e-7},
    )
    assert fit_temperature(label, score) == pytest.approx(best.x, abs=1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("label", "score", "expected"),
    [
        ([0, 0, 1], [0.1, 0.4, 0.6], 1.0),  # nothing on the wrong side: no maximum, scores stay
        ([0, 1], [0.0, 1.0], 1.0),
        ([0, 1], [0.5, 0.5], 1.0),  # scores that say nothing
        ([0, 1], [0.9, 0.1], 20.0),  # worse than a coin
        ([0] * 999 + [1] * 999 + [0], [0.499] * 999 + [0.501] * 999 + [0.501], 0.05),  # far too timid
    ],
)
def test_temperature_at_its_ends(label: list[int], score: list[float], expected: float) -> None:
    assert fit_temperature(label, score) == expected


@pytest.mark.filterwarnings("error")
@given(st.lists(SCORES, min_size=1, max_size=20), st.floats(0.05, 20))
def test_calibration_keeps_the_order_the_side_of_a_half_and_the_type(scores: list[float], temperature: float) -> None:
    for dtype in (np.float32, np.float64):
        score = np.sort(np.array(scores, dtype))
        found = calibrate(score, temperature)
        assert found.dtype == dtype
        assert ((found >= 0) & (found <= 1)).all()
        assert (np.diff(found) >= 0).all()
        assert (found[score >= 0.5] >= 0.5).all()
        assert (found[score <= 0.5] <= 0.5).all()


def test_temperature_one_returns_the_scores() -> None:
    score = np.array([0, 1e-30, 0.3, 1], np.float32)
    assert np.array_equal(calibrate(score, 1.0), score)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 0.99]), min_size=4, max_size=60),
    st.sampled_from([0.5, 0.75, 0.8, 0.9, 0.95]),
)
def test_the_threshold_keeps_the_specificity_and_a_lower_one_would_not(scores: list[float], specificity: float) -> None:
    uninfected = np.array(scores)
    n = len(uninfected)
    if n < specificity / (1 - specificity) - 1e-9:
        with pytest.raises(DatasetError, match=f"{n} uninfected validation cells cannot carry"):
            threshold_for_specificity(np.zeros(n), uninfected, specificity)
        return
    threshold = threshold_for_specificity(np.zeros(n), uninfected, specificity)
    assert np.mean(uninfected < threshold) >= specificity
    # One cell more, and the next lower threshold may not keep it: it calls the highest cell that is left out too.
    tied = uninfected[uninfected < threshold].max()
    assert np.sum(uninfected < tied) < (n + 1) * specificity


@pytest.mark.parametrize(("n", "specificity"), [(99, 0.99), (999, 0.999), (9, 0.9), (19, 0.95)])
def test_the_fewest_cells_that_carry_a_specificity(n: int, specificity: float) -> None:
    score = np.linspace(0, 0.5, n)
    threshold = threshold_for_specificity(np.zeros(n), score, specificity)
    assert threshold == np.nextafter(0.5, 1)  # without a false positive
    with pytest.raises(DatasetError, match=rf"{n - 1} uninfected .* it takes {n} or more"):
        threshold_for_specificity(np.zeros(n - 1), score[1:], specificity)


def test_new_cells_keep_the_specificity_on_average() -> None:
    rng = np.random.default_rng(0)
    # Uniform scores: the rate of false positives is 1 - threshold. By 199 cells, 1 - 198/200 of new ones are called.
    rates = [1 - threshold_for_specificity(np.zeros(199), rng.random(199), 0.99) for _ in range(2000)]
    assert np.mean(rates) == pytest.approx(0.01, abs=0.0005)


def test_a_float32_threshold_calls_no_tied_cell() -> None:
    score = np.array([0.7] * 50 + [0.9] * 50, np.float32)
    threshold = threshold_for_specificity([0] * 50 + [1] * 50, score, 0.9)
    found = cell_metrics([0] * 50 + [1] * 50, score, threshold=threshold)
    assert (found["specificity"], found["sensitivity"]) == (1, 1)
    assert 0.7 < threshold < 0.7001


@pytest.mark.parametrize(
    ("label", "score", "message"),
    [
        ([1] * 200, [0.9] * 200, "0 uninfected validation cells cannot carry a specificity of 0.99"),
        ([0] * 200, [1.0] * 200, "200 of 200 uninfected validation cells have a score of 1"),
        ([0] * 200, [1 - 2.0**-24] * 200, "200 of 200 uninfected validation cells have a score of 1"),  # counts as 1
        ([0, 1], [np.nan, 0.5], "score of row 0 is nan"),
    ],
)
def test_a_specificity_that_cannot_be_had_is_one_clear_line(label: list[int], score: list[float], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        threshold_for_specificity(label, score, 0.99)


@pytest.mark.parametrize(("only", "missing"), [(0, "parasitized"), (1, "uninfected")])
def test_one_class_in_validation_has_no_temperature(only: int, missing: str) -> None:
    with pytest.raises(DatasetError, match=f"none of the 3 validation cells is {missing}"):
        fit_temperature([only] * 3, [0.1, 0.5, 0.9])


@pytest.mark.parametrize("specificity", [0.0, 1.0, -1.0, np.nan])
def test_a_specificity_out_of_range_is_refused(specificity: float) -> None:
    with pytest.raises(ConfigError, match="specificity is"):
        threshold_for_specificity([0], [0.5], specificity)


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_a_temperature_out_of_range_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature is"):
        calibrate([0.5], temperature)


def test_a_calibration_survives_json() -> None:
    label, score = overconfident(500, 2.0)
    patient = [f"P{i % 7}" if i else None for i in range(500)]
    found = calibration.fit(label, score, patient, specificity=0.9)
    assert (found.n, found.n_patients, found.specificity) == (500, 7, 0.9)
    assert Calibration(**json.loads(json.dumps(asdict(found)))) == found
    # The very same cells are called after JSON as before.
    assert np.float32(found.threshold) == np.float32(threshold_for_specificity(label, score, 0.9))


def test_without_a_wanted_specificity_the_threshold_is_a_half() -> None:
    label, score = overconfident(50, 1.0)
    assert calibration.fit(label, score, ["P1"] * 50).threshold == 0.5
