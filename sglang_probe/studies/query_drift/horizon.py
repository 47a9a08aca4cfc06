"""Predictive horizon: for how many decode steps an observation window is worth more than a baseline.

A response that ends while the window still predicts is right-censored, not a failure at its end. Late steps come from
long responses only, so averages over time mix requests; the survival estimate does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_probe.errors import ProbeError
from sglang_probe.stats.intervals import LEAST_CLUSTERS, jackknife_interval

Array = NDArray[Any]


@dataclass(frozen=True)
class Survival:
    """Kaplan-Meier estimate: the share of requests whose window still predicts after each step with a failure."""

    times: Array
    survival: Array
    at_risk: Array
    failures: Array

    @property
    def median(self) -> float:
        """First time at which at most half survive; infinite where censoring hides it."""
        below = np.flatnonzero(self.survival <= 0.5)
        return float(self.times[below[0]]) if len(below) else float("inf")


@dataclass(frozen=True)
class Decay:
    """Fit of `limit + (start - limit) exp(-t / time)`."""

    start: float
    limit: float
    time: float
    """In steps; the half-life is `time · ln 2`. At the edge of the search range the curve shows no decay to a limit."""
    residual: float
    """Root mean square."""

    @property
    def half_life(self) -> float:
        """Steps until half of the way to the limit."""
        return self.time * float(np.log(2))


def first_failure(advantage_T: Array, *, delta: float = 0.0, run: int = 3) -> tuple[int, bool]:
    """First step of the first `run` consecutive steps whose advantage over the baseline is below `delta`.

    Args:
        advantage_T: recall of the window minus recall of the baseline, by decode step.
        delta: what counts as an advantage.
        run: consecutive steps that make a failure. A NaN step is not a failure and interrupts a run.

    Returns:
        The step and True, or the number of steps and False where the response ends first (censored).
    """
    below = np.nan_to_num(np.asarray(advantage_T, dtype=np.float64), nan=np.inf) < delta
    runs = np.convolve(below, np.ones(run), "valid") if len(below) >= run else np.empty(0)
    found = np.flatnonzero(runs == run)
    return (int(found[0]), True) if len(found) else (len(below), False)


def kaplan_meier(times: Array, observed: Array) -> Survival:
    """Product-limit estimate (Kaplan and Meier 1958). At equal times failures come before censorings.

    Args:
        times: step of failure or censoring, one per request.
        observed: whether it is a failure.

    Raises:
        ProbeError: no requests, or lengths that differ.
    """
    times, observed = np.asarray(times, dtype=np.float64), np.asarray(observed, dtype=bool)
    if not len(times) or len(times) != len(observed):
        raise ProbeError(f"{len(times)} times and {len(observed)} flags give no survival curve")
    at = np.unique(times[observed])
    failures = np.array([np.sum(observed & (times == t)) for t in at], dtype=np.int64)
    at_risk = np.array([np.sum(times >= t) for t in at], dtype=np.int64)
    return Survival(at, np.cumprod(1 - failures / at_risk), at_risk, failures)


def median_interval(times: Array, observed: Array, clusters: Sequence[object] | None = None) -> tuple[float, float]:
    """Interval of the median horizon: the times at which the interval of the survival holds one half (Brookmeyer and
    Crowley 1982), that interval being over clusters. A median has no jackknife of its own.

    Args:
        clusters: what each request belongs to; None: each to itself.

    Returns:
        An end may be infinite: the data then do not bound it. NaN with fewer than six clusters.
    """
    times, observed = np.asarray(times, dtype=np.float64), np.asarray(observed, dtype=bool)
    cluster = (
        np.arange(len(times)) if clusters is None else np.unique(np.asarray(clusters, str), return_inverse=True)[1]
    )
    names = np.unique(cluster)
    if len(names) < LEAST_CLUSTERS:
        return float("nan"), float("nan")
    whole = kaplan_meier(times, observed)
    at, estimate = whole.times, whole.survival
    if not len(at):
        return float("inf"), float("inf")
    without = np.stack([_survival_at(times[cluster != c], observed[cluster != c], at) for c in names])
    found = jackknife_interval(estimate, without)
    ends = [np.flatnonzero(np.where(np.isnan(x), estimate, x) <= 0.5) for x in (found.low, found.high)]
    low, high = (float(at[e[0]]) if len(e) else float("inf") for e in ends)
    return low, high


def _survival_at(times: Array, observed: Array, at: Array) -> Array:
    found = kaplan_meier(times, observed)
    return np.concatenate([[1.0], found.survival])[np.searchsorted(found.times, at, side="right")]


def fit_decay(values_T: Array) -> Decay:
    """Least squares over a grid of decay times, exact in the two linear parameters at each; NaN steps are left out.

    Raises:
        ProbeError: fewer than four steps with a value.
    """
    y = np.asarray(values_T, dtype=np.float64)
    t = np.arange(len(y), dtype=np.float64)[~np.isnan(y)]
    y = y[~np.isnan(y)]
    if len(y) < 4:
        raise ProbeError(f"{len(y)} steps do not determine a decay")
    grid = np.geomspace(0.25, 10 * (t[-1] + 1), 400)
    best = min((_linear_fit(t, y, time) for time in grid), key=lambda d: d.residual)
    step = grid[1] / grid[0]
    finer = np.geomspace(best.time / step, best.time * step, 200)
    return min((_linear_fit(t, y, time) for time in finer), key=lambda d: d.residual)


def _linear_fit(t: Array, y: Array, time: float) -> Decay:
    design = np.stack([np.exp(-t / time), np.ones_like(t)], axis=1)
    (drop, limit), *_ = np.linalg.lstsq(design, y, rcond=None)
    residual = float(np.sqrt(np.mean((design @ np.array([drop, limit]) - y) ** 2)))
    return Decay(float(drop + limit), float(limit), float(time), residual)
