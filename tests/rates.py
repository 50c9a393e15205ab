"""Rates of error that are known, not learnt from cells."""

from __future__ import annotations

import numpy as np
from scipy import stats

from malaria_ray.statistics.rates import SHARES, PatientRate


def of_beta(alpha: float, beta: float) -> PatientRate:
    """Rates that are beta distributed between patients, 1.5e-8 from 0 and 1 at least as learnt ones are."""
    quantiles = np.clip(stats.beta.ppf(SHARES, alpha, beta), 1.5e-8, 1 - 1.5e-8)
    n_errors = round(alpha / (alpha + beta) * 10**9)
    return PatientRate(quantiles=tuple(quantiles.tolist()), n_errors=n_errors, n_cells=10**9, n_patients=0)
