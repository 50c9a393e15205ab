"""What a run learns of its scores comes from validation cells; nothing else can reach it."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from malaria_ray.errors import DatasetError
from malaria_ray.statistics.calibration import calibrate
from malaria_ray.statistics.validation import Validation, learn_from_validation


def scored(n: int = 3000) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, n)
    score = expit(rng.normal(6 * label - 3, 2)).astype(np.float32)
    split = rng.choice(["train", "val", "test"], n, p=[0.6, 0.2, 0.2])
    patient = [f"{part}-{i}" for part, i in zip(split, rng.integers(0, 15, n), strict=True)]
    return pd.DataFrame({"split": split, "patient_id": patient, "label": label, "score": score})


CELLS = scored()


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.sampled_from(["train", "test"]))
def test_labels_and_scores_of_other_splits_cannot_reach_the_fit(seed: int, split: str) -> None:
    rng, changed = np.random.default_rng(seed), CELLS.copy()
    other = (changed["split"] == split).to_numpy()
    changed.loc[other, "label"] = rng.integers(0, 2, other.sum())
    changed.loc[other, "score"] = rng.random(other.sum(), np.float32)
    assert learn_from_validation(changed, specificity=0.95) == learn_from_validation(CELLS, specificity=0.95)


def test_cells_of_other_splits_need_neither_label_nor_score() -> None:
    alone = CELLS[CELLS["split"] == "val"]
    blank = CELLS.assign(
        label=CELLS["label"].where(CELLS["split"] == "val").astype("Int8"),
        score=CELLS["score"].where(CELLS["split"] == "val"),
    )
    assert learn_from_validation(blank, specificity=0.9) == learn_from_validation(alone, specificity=0.9)


def test_the_order_of_rows_changes_nothing() -> None:
    one, other = learn_from_validation(CELLS), learn_from_validation(CELLS[::-1])
    assert one.rates == other.rates
    assert one.calibration.temperature == pytest.approx(other.calibration.temperature, abs=1e-9)


def test_it_survives_json() -> None:
    for found in (learn_from_validation(CELLS, specificity=0.95), learn_from_validation(CELLS.assign(patient_id=None))):
        assert Validation.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def near(score: float, n_steps: int) -> float:
    for _ in range(n_steps):
        score = np.nextafter(np.float32(score), np.float32(1))
    return float(score)


@pytest.mark.parametrize("start", [0.6, 0.9, 0.99, 0.9999])
def test_the_threshold_of_calibrated_scores_excludes_the_cells_that_it_must(start: float) -> None:
    """A temperature above 1 draws neighbouring float32 numbers together."""
    for n_steps in range(20):
        highest = near(start, n_steps)
        uninfected, parasitized = [highest] * 20, [0.3] * 10 + [0.99995] * 30  # too sure: the temperature is above 1
        label, score = [0] * 20 + [1] * 40, np.array(uninfected + parasitized, np.float32)
        cells = pd.DataFrame({"split": "val", "patient_id": None, "label": label, "score": score})
        found = learn_from_validation(cells, specificity=0.9)
        assert found.calibration.temperature > 1
        calibrated = calibrate(score, found.calibration.temperature)
        assert not (calibrated[:20] >= found.threshold).any()
        assert (calibrated[30:] >= found.threshold).all()


def test_a_temperature_at_which_the_excluded_cells_score_one_is_one_clear_line() -> None:
    score = np.array([0.42] * 1000 + [0.95] * 20 + [0.58] * 1000 + [0.42] * 3, np.float32)
    cells = pd.DataFrame({"split": "val", "patient_id": "P1", "label": [0] * 1020 + [1] * 1003, "score": score})
    with pytest.raises(DatasetError, match="must exclude have a calibrated score of 1; lower it"):
        learn_from_validation(cells, specificity=0.99)


def test_the_rates_are_those_at_the_threshold() -> None:
    found = learn_from_validation(CELLS, specificity=0.95)
    assert found.rates is not None
    assert found.rates.threshold == found.threshold
    false_positive = found.rates.false_positive
    assert false_positive.n_errors / false_positive.n_cells <= 0.05
    assert false_positive.n_patients == found.calibration.n_patients == 15


def test_without_patients_scores_are_calibrated_and_the_rates_say_why_they_are_missing() -> None:
    found = learn_from_validation(CELLS.assign(patient_id=None))
    assert found.rates is None
    assert found.rates_missing is not None
    assert "no uninfected validation cell of a known patient" in found.rates_missing
    assert found.calibration.n_patients == 0


def test_no_validation_cell_is_one_clear_line() -> None:
    with pytest.raises(DatasetError, match="none of the 3000 cells is in the val split"):
        learn_from_validation(CELLS.assign(split="test"))
