"""From the counts of a patient's cells and the model's rates of error to a corrected fraction and a call.

Throughout,
    n_parasitized, n_cells  (p,) counts of p patients: cells called parasitized, cells; 0 <= n_parasitized <= n_cells
    rates                   what is known of the false-positive and false-negative rate of a patient not seen before

Of a patient with a share t of parasitized cells the model calls a share t · (1 - fn) + (1 - t) · fp, with rates fp and
fn of this patient's own. All below follows from the distribution of the count under that, averaged over fp and fn.

Fractions are of the crops that the archive holds: where those were chosen, to balance the classes say, they are not the
patient's parasitaemia, and nothing here makes them that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, gammaln, ndtri, xlog1py, xlogy

from malaria_ray.errors import DatasetError
from malaria_ray.schema import Call
from malaria_ray.statistics.metrics import Floats, Integers
from malaria_ray.statistics.rates import ErrorRates

CONFIDENCE = 0.95
"""Of all intervals here."""

PATIENT_SPECIFICITY = 0.95
"""Share of uninfected patients whom a model must not call positive."""

DETECTION = 0.95
"""Share of patients who are called positive at the limit of detection."""

MAX_MORE_CELLS = 10**9

Nodes = tuple[Floats, Floats]

_N_NODES, _STEP = 377, 233  # a Fibonacci lattice: neighbouring Fibonacci numbers
_N_UNINFECTED = 400  # patients that stand for the uninfected; `PATIENT_SPECIFICITY` of them is a whole number
_N_HALVINGS = 16  # on the scale of √t: within 3e-5 where t is near 1, less below
_AT_ONCE = 1000
_Z = float(ndtri((1 + CONFIDENCE) / 2))


def corrected_fraction(
    n_parasitized: ArrayLike, n_cells: ArrayLike, rates: ErrorRates
) -> tuple[Floats, Floats, Floats]:
    """Share of each patient's cells that are parasitized, lower and upper end of its interval: (p,) float64 in 0..1.

    The value is Rogan & Gladen 1978, Estimating prevalence from the results of a screening test, cut to 0..1 (the count
    compensation of czbiohub-sf/remo-stats-utils is the same with an inverse confusion matrix); where skewed rates put
    it outside of the interval, the interval's nearer end.

    The interval holds the fractions under which a count as low, and one as high, is not less likely than
    (1 - `CONFIDENCE`) / 2, half of the count itself taken with either side (mid-P). For known rates that is the exact
    interval of Reiczigel et al. 2010; here the rates of this patient are uncertain, by the spread between patients and
    by what the validation cells leave open. (Lang & Reiczigel 2014, Confidence limits for prevalence of disease
    adjusted for estimated diagnostic sensitivity and specificity, carry only the latter, by a normal approximation.)
    In simulations (`coverage` in tests/statistics/test_calls.py) nominal 95 % intervals held the truth of 95 to 97 % of
    patients with 60 to 1,000 cells where rates had been learnt from 30 or 100 patients, of 97 to 99 % where from 5 to
    12; of 98 % with ten cells or none parasitized.

    NaN for patients without cells, and for all where the model calls parasitized cells no oftener than others. Raises
    DatasetError for counts out of range.
    """
    k, n = _check_counts(n_parasitized, n_cells)
    fp, fn = rates.false_positive.mean, rates.false_negative.mean
    if fp + fn >= 1:
        return np.full(len(n), np.nan), np.full(len(n), np.nan), np.full(len(n), np.nan)
    tail = (1 - CONFIDENCE) / 2
    nodes = _nodes(rates)

    def ends(k: Integers, n: Integers) -> Floats:
        def as_high(t: Floats) -> Floats:
            return _tail(k, n, t, nodes, mid_p=True)

        return np.stack([_crossing(as_high, tail, len(n)), _crossing(as_high, 1 - tail, len(n))])

    low, high = _of_distinct(ends, k, n)
    low, high = np.where(np.isnan(low), 1.0, low), np.where(np.isnan(high), 1.0, high)
    with np.errstate(invalid="ignore"):
        value = np.clip((k / n - fp) / (1 - fn - fp), low, high)
    none = n == 0
    return value, np.where(none, np.nan, low), np.where(none, np.nan, high)


def call_threshold(rates: ErrorRates) -> float:
    """The share of cells called parasitized that `PATIENT_SPECIFICITY` of uninfected patients do not exceed: the noise
    floor of Delahunt et al. 2024, in 0..1.
    """
    return float(rates.false_positive.quantile(PATIENT_SPECIFICITY))


def patient_call(n_parasitized: ArrayLike, n_cells: ArrayLike, rates: ErrorRates) -> NDArray[np.object_]:
    """(p,) of `Call`: on which side of `call_threshold` the patient's share of called cells is.

    positive   Wilson's interval of the share lies above it, and so many called cells are seen in at most
               1 - `PATIENT_SPECIFICITY` of uninfected patients: that interval alone is too short where few are expected
    negative   it lies below, no more than uninfected patients show, and so many cells have a `limit_of_detection`. An
               infection below that limit looks the same
    undecided  it lies on both sides, so the cells are too few to tell; or not even a patient of nothing but parasitized
               cells would be sure to be found, so that nothing is excluded

    In simulations of patients with 130 cells and rates learnt from 5 to 100 patients 0.6 to 1.4 % of uninfected ones
    were called positive where 5 % were allowed, and 95 to 97 % at the limit of detection. Raises as
    `corrected_fraction` does.
    """
    k, n = _check_counts(n_parasitized, n_cells)
    is_positive = k >= _fewest_positive(n, rates)
    is_negative = (_distance(k, n, call_threshold(rates)) < -1) & _is_enough(n, rates)
    return np.select([is_positive, is_negative], [Call.positive, Call.negative], Call.undecided).astype(object)


def n_more_cells(n_parasitized: ArrayLike, n_cells: ArrayLike, rates: ErrorRates) -> pd.Series:
    """(p,) Int64: cells that an undecided patient needs on top, should they be called as those before; 0 for the
    decided, null where no number up to 10⁹ decides: the share lies on the threshold itself, or the rates of error are
    too high or too little known to exclude anything.

    Raises as `patient_call` does.
    """
    k, n = _check_counts(n_parasitized, n_cells)
    threshold = call_threshold(rates)
    distance = _distance(k, n, threshold)
    is_undecided = patient_call(k, n, rates) == Call.undecided
    with np.errstate(divide="ignore", invalid="ignore"):
        # The distance grows with √n. Of no cells at all, suppose what healthy patients show: the fewest that decide.
        needed = np.where(n > 0, n / distance**2, _Z**2 * (1 - threshold) / threshold)
    total = np.maximum(np.floor(needed), n) + 1
    is_asked = is_undecided & (total <= MAX_MORE_CELLS)
    is_low = (distance < 0) | (n == 0)
    low, high = is_asked & is_low, is_asked & ~is_low
    share = k / np.maximum(n, 1)
    total[low] = _next_negative(share[low], total[low].astype(np.int64), rates)
    total[high] = _next_positive(share[high], total[high].astype(np.int64), rates)
    more = pd.Series(np.where(is_undecided, total - n, 0))
    return more.where(more <= MAX_MORE_CELLS).astype("Int64")


def limit_of_detection(n_cells: ArrayLike, rates: ErrorRates) -> Floats:
    """(p,) float64 in 0..1: the smallest true fraction of parasitized cells that is called positive in 95 % of patients
    with so many cells (`DETECTION`); NaN where even 1 is not.

    More cells lower it only as far as the noise floor: Delahunt et al. 2024; the limit of detection above a limit of
    blank of CLSI EP17, as Joanny et al. 2014 (Malaria Journal 13:234) measure it for microscopists.

    Raises as `patient_call` does.
    """
    n = _check_counts(np.zeros_like(np.asarray(n_cells)), n_cells)[1]
    nodes = _nodes(rates)

    def limits(fewest: Integers, n: Integers) -> Floats:
        return _crossing(lambda t: _tail(fewest, n, t, nodes), DETECTION, len(n))[None]

    found: Floats = _of_distinct(limits, _fewest_positive(n, rates), n)[0]
    return found


def _fewest_positive(n: Integers, rates: ErrorRates) -> Integers:
    """(p,) the smallest count of n cells that is called positive; n + 1 where none is."""
    threshold, allowed = call_threshold(rates), 1 - PATIENT_SPECIFICITY
    half_width = _Z * np.sqrt(n * threshold * (1 - threshold))
    above = np.minimum(np.floor(n * threshold + half_width).astype(np.int64) + 1, n + 1)
    fp = rates.false_positive.quantile((np.arange(_N_UNINFECTED) + 0.5) / _N_UNINFECTED)

    def is_seldom(k: Integers, n: Integers) -> NDArray[np.bool_]:
        seldom: NDArray[np.bool_] = _tail(k, n, np.zeros(len(n)), (fp, fp)) <= allowed
        return seldom

    def fewest(low: Integers, n: Integers) -> Integers:
        high = np.where(is_seldom(low, n), low, n + 1)
        while np.any(low < high):
            middle = (low + high) // 2
            is_low = is_seldom(middle, n)
            low, high = np.where(is_low, low, np.minimum(middle + 1, high)), np.where(is_low, middle, high)
        return high[None]

    found: Integers = _of_distinct(fewest, above, n)[0].astype(np.int64)
    return found


def _next_positive(share: Floats, n: Integers, rates: ErrorRates) -> Integers:
    """(p,) the smallest numbers of cells, n or more, of which this share, rounded, is called positive."""
    n = n.copy()
    while (is_short := np.rint(share * n) < _fewest_positive(n, rates)).any():
        n += is_short
    return n


def _next_negative(share: Floats, n: Integers, rates: ErrorRates) -> Floats:
    """(p,) the smallest numbers of cells, n or more, of which this share, rounded, is called negative; infinite where
    none is. Rounded up, it may lie nearer to the threshold than the share itself.
    """
    found, threshold = n.astype(float), call_threshold(rates)
    is_open = np.ones(len(n), bool)
    while is_open.any():
        share_, n_ = share[is_open], found[is_open].astype(np.int64)
        while (is_short := _distance(np.rint(share_ * n_), n_, threshold) >= -1).any():
            n_ += is_short
        found[is_open] = enough = _next_enough(n_, rates)
        is_open[is_open] = np.isfinite(enough) & (enough > n_)  # its rounded share is to be looked at again
    return found


def _is_enough(n: Integers, rates: ErrorRates) -> NDArray[np.bool_]:
    """(p,) whether so many cells have a limit of detection: with all parasitized, `DETECTION` of patients are found."""
    nodes = _nodes(rates)

    def found(fewest: Integers, n: Integers) -> Floats:
        return _tail(fewest, n, np.ones(len(n)), nodes)[None]

    share = _of_distinct(found, _fewest_positive(n, rates), n)[0]
    is_enough: NDArray[np.bool_] = share >= DETECTION
    return is_enough


def _next_enough(n: Integers, rates: ErrorRates) -> Floats:
    """(p,) the smallest numbers of cells, n or more, that have a limit of detection, above 512 within a tenth; infinite
    where none has one. A number may be enough though the next is not: the count that is called positive goes up by one.
    """
    if not len(n):
        return np.empty(0)
    some = np.unique(np.concatenate([np.arange(1, 513), np.geomspace(512, MAX_MORE_CELLS, 152)]).astype(np.int64))
    enough = some[_is_enough(some, rates)]
    following = np.append(enough.astype(float), np.inf)[np.searchsorted(enough, n)]
    found: Floats = np.where(_is_enough(n, rates), n, following)
    return found


def _distance(k: Integers, n: Integers, threshold: float) -> Floats:
    """How far k / n lies from the threshold, in half widths: beyond ±1 Wilson's interval leaves the threshold out."""
    half_width = _Z * np.sqrt(threshold * (1 - threshold) / np.maximum(n, 1))
    share = np.where(n > 0, k / np.maximum(n, 1), threshold)
    distance: Floats = (share - threshold) / half_width
    return distance


def _nodes(rates: ErrorRates) -> Nodes:
    """(377,) false-positive rates and (377,) sensitivities of patients that stand for all, each of equal weight."""
    i = np.arange(_N_NODES)
    fp = rates.false_positive.quantile((i + 0.5) / _N_NODES)
    fn = rates.false_negative.quantile((i * _STEP % _N_NODES + 0.5) / _N_NODES)
    return fp, 1 - fn


def _tail(k: Integers, n: Integers, t: Floats, nodes: Nodes, *, mid_p: bool = False) -> Floats:
    """(p,) P(count >= k) in n cells of a patient with a fraction t parasitized, averaged over rates of error; with
    `mid_p` less half of P(count = k)."""
    fp, sensitivity = nodes
    k, n, t = k[:, None], n[:, None], t[:, None]
    called = t * sensitivity + (1 - t) * fp
    inner = np.clip(k, 1, np.maximum(n, 1))
    tail = np.where(k <= 0, 1.0, np.where(k > n, 0.0, betainc(inner, np.maximum(n - inner + 1, 1), called)))
    if mid_p:
        ways = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
        tail = tail - np.exp(ways + xlogy(k, called) + xlog1py(n - k, -called)) / 2
    mean: Floats = tail.mean(axis=1)
    return mean


def _crossing(rising: Callable[[Floats], Floats], level: float, n: int) -> Floats:
    """(n,) where a function of 0..1 reaches the level: 0 where it begins above, NaN where it never does."""
    low, high = np.zeros(n), np.ones(n)
    for _ in range(_N_HALVINGS):
        middle = (low + high) / 2
        reached = rising(middle**2) >= level
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    found = np.where(rising(np.zeros(n)) >= level, 0.0, high**2)
    return np.where(rising(np.ones(n)) >= level, found, np.nan)


def _of_distinct(function: Callable[[Integers, Integers], NDArray[Any]], k: Integers, n: Integers) -> NDArray[Any]:
    """Applies a function of (k, n) → (r, p) to each distinct pair once, a thousand at a time."""
    pairs, inverse = np.unique(np.stack([k, n]), axis=1, return_inverse=True)
    starts = range(0, pairs.shape[1], _AT_ONCE)
    found = [function(pairs[0, i : i + _AT_ONCE], pairs[1, i : i + _AT_ONCE]) for i in starts]
    if not found:
        return np.empty((2, 0))
    return np.concatenate(found, axis=1)[:, inverse.reshape(-1)]


def _check_counts(n_parasitized: ArrayLike, n_cells: ArrayLike) -> tuple[Integers, Integers]:
    k, n = np.broadcast_arrays(
        np.atleast_1d(np.asarray(n_parasitized, dtype=np.int64)), np.atleast_1d(np.asarray(n_cells, dtype=np.int64))
    )
    bad = (k < 0) | (k > n)
    if bad.any():
        raise DatasetError(f"{k[bad][0]} of {n[bad][0]} cells called parasitized: allowed are 0 to all of them")
    return k, n
