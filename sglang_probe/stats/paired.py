"""Paired differences of many cells over the same independent units: intervals and sign-flip tests, all at once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np

from sglang_probe.stats.bootstrap import Interval

Array = np.ndarray[Any, Any]

_ALL_FLIPS = 14
"""Units up to which every pattern of signs is tried: 16,384 of them."""
_BLOCK = 1 << 22
"""Weights or signs held at once."""


def mean_intervals(values: Array, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Percentile bootstrap intervals of the mean of every column, units drawn with replacement (Efron 1979).

    All columns share the draws. A unit whose entry is NaN takes no part in that column.

    Args:
        values: `[n_units, k]`; differences to a baseline make it the paired bootstrap.

    Returns:
        Arrays `[k]`; NaN for a column without a value.
    """
    values = np.asarray(values, dtype=np.float64)
    return ratio_intervals(values, np.ones_like(values), resamples=resamples, confidence=confidence, seed=seed)


def ratio_intervals(
    numerators: Array, denominators: Array, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """As `mean_intervals` for sums of numerators over sums of denominators, `[n_units, k]` each."""
    numerators, denominators = (np.asarray(x, dtype=np.float64) for x in (numerators, denominators))
    n, k = numerators.shape
    here = ~(np.isnan(numerators) | np.isnan(denominators))
    above, below = np.where(here, numerators, 0.0), np.where(here, denominators, 0.0)
    found = np.empty((k, resamples))
    with np.errstate(invalid="ignore", divide="ignore"):
        for start, drawn in draws(n, resamples, seed=seed):
            found[:, start : start + len(drawn)] = (above.T @ drawn.T) / (below.T @ drawn.T)
        estimate = above.sum(0) / below.sum(0)
    tail = (1 - confidence) / 2
    low, high = np.full(k, np.nan), np.full(k, np.nan)
    some = here.any(0)
    if some.any():
        low[some], high[some] = _quantiles(found[some], (tail, 1 - tail))
    return Interval(estimate, low, high)


@lru_cache(maxsize=4)
def draws(n: int, resamples: int, *, seed: int = 0) -> list[tuple[int, Array]]:
    """Bootstrap weights in blocks, each with the number of its first resample: how often each of n units is drawn."""
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // max(n, 1))
    share = np.full(n, 1 / n)
    return [
        (start, rng.multinomial(n, share, size=min(rows, resamples - start)).astype(np.float64))
        for start in range(0, resamples, rows)
    ]


def sign_flips(
    differences: Array,
    *,
    alternative: Literal["two-sided", "greater"] = "two-sided",
    resamples: int = 9999,
    seed: int = 0,
) -> Array:
    """p-values of "the mean of the column is zero" (`greater`: "is not above zero"), by flipping the signs of
    independent differences. All columns share the flips.

    Exact if a difference is as likely as its negative under the null hypothesis (Fisher 1935, the paired design). All
    patterns are tried for up to 14 units, a random draw beyond, in which the observed signs count (Phipson and Smyth
    2010).

    Args:
        differences: one per independent unit, `[n_units, k]`; NaN entries take no part.

    Returns:
        `[k]`, never below `2**-n_units`; NaN for a column without a value.
    """
    d = np.asarray(differences, dtype=np.float64)
    empty = np.isnan(d).all(0)
    d = np.nan_to_num(d)
    n = len(d)

    def sums(signs: Array) -> Array:
        return np.abs(signs @ d) if alternative == "two-sided" else signs @ d

    observed = sums(np.ones((1, n)))[0]
    reach = observed - 1e-12 * np.abs(d).sum(0)  # sums of the same numbers in another order are equal
    if n <= _ALL_FLIPS:
        signs = 1.0 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        p = (sums(signs) >= reach).mean(0)
    else:
        rng = np.random.default_rng(seed)
        hits = np.ones(d.shape[1])
        rows = max(1, _BLOCK // n)
        for start in range(0, resamples, rows):
            signs = rng.choice([-1.0, 1.0], size=(min(rows, resamples - start), n))
            hits += (sums(signs) >= reach).sum(0)
        p = hits / (resamples + 1)
    return np.where(empty, np.nan, p)


def _quantiles(found: Array, at: tuple[float, float]) -> Array:
    """Along the last axis; draws without a value (all units absent, a zero denominator) are left out."""
    if np.isfinite(found).all():
        return np.asarray(np.quantile(found, at, axis=-1))
    return np.asarray(np.nanquantile(np.where(np.isfinite(found), found, np.nan), at, axis=-1))
