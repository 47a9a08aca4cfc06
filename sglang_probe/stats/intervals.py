"""The one interval that every study prints: from a handful of clusters that are independent of each other.

Leave one cluster out, and see how the statistic moves (the cluster jackknife: Tukey 1958; Efron and Tibshirani 1993,
chapter 11). That gives a standard error for anything that is computed from clusters. The interval is Student's t with
one degree of freedom less than there are clusters, widened to hold the interval of Hall (1992), which turns the
skewness of the clusters into another reach to each side: Student's own covers too seldom where a few clusters are far
larger than the others. There are no random draws, so that the same data always have the same interval.

The percentiles of a bootstrap, which this replaces, cover 80 to 91 % of the time at a nominal 95 % with 4 to 12
clusters (Hall 1988; Cameron, Gelbach and Miller 2008). `docs/evidence/statistics.md` has the coverage of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

Array = np.ndarray[Any, Any]

LEAST_CLUSTERS = 6
"""With fewer there is no interval and no test: five clusters hold next to no information on their own spread, and of
2**5 patterns of signs one is already 3 %."""

TOO_FEW = f"too few clusters: an interval needs {LEAST_CLUSTERS}"


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; arrays of the statistic's shape. The ends are NaN where there is no interval."""

    estimate: Array
    low: Array
    high: Array


def jackknife_interval(
    estimate: Array, without: Array, *, confidence: float = 0.95, bounds: tuple[float, float] | None = None
) -> Interval:
    """The interval of any statistic of n independent clusters.

    Args:
        estimate: from all clusters, `[...]`.
        without: from all but one cluster each, `[n, ...]`. NaN where the cluster takes no part; an infinite value means
            that the statistic needs that cluster.
        bounds: values that the statistic cannot pass.

    Returns:
        No interval (NaN) where fewer than `LEAST_CLUSTERS` clusters take part, where the statistic needs a single one
        of them, and where leaving out any of them changes nothing: clusters that do not vary do not say how much they
        would.
    """
    estimate = np.asarray(estimate, dtype=np.float64)
    error, lean, n = _jackknife(estimate, np.asarray(without, dtype=np.float64))
    known = np.isfinite(error) & (error > 0) & np.isfinite(estimate)
    with np.errstate(invalid="ignore"):
        reach = student.ppf((1 + confidence) / 2, n - 1)
        right = np.maximum(reach, _unlean(reach, lean))
        left = np.minimum(-reach, _unlean(-reach, lean))
        low, high = estimate - right * error, estimate - left * error
    low, high = np.where(known, low, np.nan), np.where(known, high, np.nan)
    if bounds is not None:
        low, high = np.clip(low, *bounds), np.clip(high, *bounds)
    return Interval(estimate, low, high)


def crossed_interval(
    estimate: float,
    without_rows: Array,
    without_columns: Array,
    *,
    confidence: float = 0.95,
    bounds: tuple[float, float] | None = None,
) -> tuple[float, float]:
    """The interval of a statistic of a table whose rows and columns are both drawn, e.g. policies and prompts.

    How far it reaches to each side is what `jackknife_interval` over rows and over columns reach, as the sides of a
    right angle (Zou and Donner 2008): variances of the two draws add. What both draws share is counted twice, so that
    it is wide rather than narrow.

    Args:
        without_rows, without_columns: as `without` of `jackknife_interval`. Six or more units of which leaving out any
            changes nothing add nothing.

    Returns:
        Low and high; NaN where a draw has no interval.
    """
    reach = []
    for without in (without_rows, without_columns):
        known = without[~np.isnan(without)]
        if len(known) >= LEAST_CLUSTERS and np.all(np.abs(known - estimate) <= 1e-12):
            continue
        found = jackknife_interval(np.asarray(estimate), without, confidence=confidence)
        reach.append((estimate - float(found.low), float(found.high) - estimate))
    low, high = (float(np.sqrt(sum(r[side] ** 2 for r in reach))) for side in (0, 1))
    if not reach:
        return float("nan"), float("nan")
    ends = (estimate - low, estimate + high)
    return ends if bounds is None else (float(np.clip(ends[0], *bounds)), float(np.clip(ends[1], *bounds)))


def jackknife_p(estimate: Array, without: Array) -> Array:
    """Two-sided p-value of "the statistic is zero": at most 0.05 where the 95 % interval leaves out zero.

    Never below `2**(1 - n)`, which is what n clusters can say by their signs alone; 1 where all clusters say zero.

    Args:
        estimate, without: as in `jackknife_interval`.
    """
    estimate = np.asarray(estimate, dtype=np.float64)
    error, lean, n = _jackknife(estimate, np.asarray(without, dtype=np.float64))
    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.where((error == 0) & (estimate == 0), 0.0, estimate / error)
        bent = t + lean * t**2 / 3 + lean**2 * t**3 / 27 + lean / 6
        p = np.maximum(*(2 * student.sf(np.abs(x), n - 1) for x in (t, np.where(np.isfinite(t), bent, t))))
        return np.where(np.isfinite(error), np.maximum(p, 2.0 ** (1 - n)), np.nan)


def cluster_interval(
    values: Array, statistic: Callable[[Array], Array], *, confidence: float = 0.95, bounds: Any = None
) -> Interval:
    """The interval of a statistic of summed cluster totals.

    Args:
        values: per-cluster sums, `[n_clusters, k]`.
        statistic: from summed totals `[..., k]` to `[..., m]`, vectorised over leading axes.
    """
    total = values.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        without = np.asarray(statistic(total - values), dtype=np.float64)
    without = np.where(np.isnan(without), np.inf, without)  # nothing is left of it: it needs the cluster
    return jackknife_interval(statistic(total), without, confidence=confidence, bounds=bounds)


def mean_intervals(values: Array, *, confidence: float = 0.95, bounds: Any = None) -> Interval:
    """The interval of the mean of every column; for a mean the jackknife's error is the standard error.

    Args:
        values: one number a unit, `[n_units, k]`; differences to a baseline make it a paired interval. A unit whose
            entry is NaN takes no part in that column.

    Returns:
        Arrays `[k]`; NaN for a column without a value.
    """
    return jackknife_interval(*_means(values), confidence=confidence, bounds=bounds)


def mean_p(values: Array) -> Array:
    """p-value of "the mean of the column is zero", `[k]`: of `mean_intervals`' own test, NaN with fewer than
    `LEAST_CLUSTERS` units."""
    return jackknife_p(*_means(values))


def ratio_intervals(numerators: Array, denominators: Array, *, confidence: float = 0.95) -> Interval:
    """As `mean_intervals` for sums of numerators over sums of denominators, `[n_units, k]` each."""
    return jackknife_interval(*_ratios(numerators, denominators), confidence=confidence)


def _means(values: Array) -> tuple[Array, Array]:
    values = np.asarray(values, dtype=np.float64)
    return _ratios(values, np.ones_like(values))


def _ratios(numerators: Array, denominators: Array) -> tuple[Array, Array]:
    above, below = (np.asarray(x, dtype=np.float64) for x in (numerators, denominators))
    here = ~(np.isnan(above) | np.isnan(below))
    above, below = np.where(here, above, 0.0), np.where(here, below, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        estimate = above.sum(0) / below.sum(0)
        without = (above.sum(0) - above) / (below.sum(0) - below)
    return estimate, np.where(here, np.where(np.isnan(without), np.inf, without), np.nan)


def _jackknife(estimate: Array, without: Array) -> tuple[Array, Array, Array]:
    """Standard error, skewness over the root of n, and n; the error is NaN where there is no interval."""
    here = ~np.isnan(without)
    n = here.sum(0).astype(np.float64)
    few = n < LEAST_CLUSTERS
    safe = np.where(few, LEAST_CLUSTERS, n)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        mean = np.where(here, without, 0.0).sum(0) / safe
        # What a cluster pulls: positive if the statistic is lower without it.
        pull = np.where(here, mean - without, 0.0)
        scale = np.abs(pull).max(0, initial=0.0)
        # Sums with a cluster taken out again are not to the last digit what they were.
        scale = np.where(scale <= 1e-12 * np.abs(estimate) + 1e-15, 0.0, scale)
        unit = pull / np.where(scale > 0, scale, 1.0)
        second, third = (unit**2).sum(0), (unit**3).sum(0)
        error = scale * np.sqrt((safe - 1) / safe * second)
        skewness = np.where(second > 0, third / safe / (second / safe) ** 1.5, 0.0)
    skewness = skewness * np.sqrt(safe * (safe - 1)) / (safe - 2)
    fine = ~few & np.isfinite(without).sum(0).astype(np.float64).__eq__(n)
    return np.where(fine, error, np.nan), np.nan_to_num(skewness / np.sqrt(safe)), safe


def _unlean(x: Array, lean: Array) -> Array:
    """Hall's transformation backwards: the t-value whose skewness-corrected value is `x` (Hall 1992, with the
    skewness of the sample, adjusted for its size)."""
    a = np.where(np.abs(lean) < 1e-6, 1.0, lean)
    bent = 3 / a * (np.cbrt(1 + a * (x - a / 6)) - 1)
    return np.asarray(np.where(np.abs(lean) < 1e-6, x, bent))
