"""All that a run learns of its model's scores, from the cells of its validation split and no others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from malaria_ray.errors import DatasetError
from malaria_ray.schema import Split
from malaria_ray.statistics import calibration
from malaria_ray.statistics.calibration import Calibration
from malaria_ray.statistics.rates import ErrorRates, fit_error_rates


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What is stored with the run.

    rates          of error of calibrated scores at `threshold`; None where they cannot be learnt
    rates_missing  why not, one line; None where they are there
    """

    calibration: Calibration
    rates: ErrorRates | None
    rates_missing: str | None

    @property
    def threshold(self) -> float:
        """Calibrated score from which a cell is called parasitized: float32, as published scores are."""
        return _calibrated_threshold(self.calibration)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Validation:
        return cls(
            calibration=Calibration(**values["calibration"]),
            rates=ErrorRates.from_dict(values["rates"]) if values["rates"] else None,
            rates_missing=values["rates_missing"],
        )


def learn_from_validation(cells: pd.DataFrame, *, specificity: float | None = None) -> Validation:
    """Temperature, threshold and rates of error of a model.

    cells        columns split, label, score and patient_id; rows of other splits than `val` are never looked at, so
                 they may as well be there without a label or score
    specificity  wanted of the threshold on cells; 0.5 is the threshold without

    The threshold and the rates at it are of the same cells. `threshold_for_specificity` is chosen so that it holds for
    new ones too; with a threshold chosen freely on few cells the rates would come out a little too good.

    Raises DatasetError and ConfigError as `calibration.fit` does, and DatasetError where no calibrated score can be the
    threshold. Where only the rates of error cannot be learnt, as
    without patients, it says so in `rates_missing`.
    """
    validation = cells[cells["split"] == Split.val]
    if validation.empty:
        raise DatasetError(f"none of the {len(cells)} cells is in the {Split.val} split: nothing to learn from")
    label, score, patient = validation["label"], validation["score"], validation["patient_id"]
    found = calibration.fit(label, score, patient, specificity=specificity)
    calibrated = calibration.calibrate(np.asarray(score, np.float32), found.temperature)
    threshold = _calibrated_threshold(found)
    try:
        rates = fit_error_rates(patient, label, calibrated, threshold=threshold)
    except DatasetError as error:
        return Validation(calibration=found, rates=None, rates_missing=str(error))
    return Validation(calibration=found, rates=rates, rates_missing=None)


def _calibrated_threshold(found: Calibration) -> float:
    """Raises DatasetError where rounding leaves no calibrated score above the uninfected cell just below the threshold.

    A temperature above 1 draws scores together, so that the two may round to one number; one far below 1 makes both 1.
    """
    at = np.float32(found.threshold)
    below = np.nextafter(at, np.float32(0))
    calibrated_below, calibrated = calibration.calibrate(np.array([below, at]), found.temperature)
    if found.specificity is None or calibrated > calibrated_below:
        return float(calibrated)
    if calibrated_below >= 1:
        raise DatasetError(
            f"at temperature {found.temperature:.3g} the uninfected validation cells that a specificity of "
            f"{found.specificity:g} must exclude have a calibrated score of 1; lower it or train a better model"
        )
    return float(np.nextafter(calibrated_below, np.float32(1)))
