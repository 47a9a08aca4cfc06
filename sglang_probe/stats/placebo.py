"""Is what happens at a border more than what happens at any place of the same text?

Every cluster has one true border and some placebo borders, at which the same statistic was taken. If the true border is
nothing special, it could be any of them: so the true one is drawn at random in every cluster, again and again, and the
mean over clusters is compared with what was seen (a randomisation test within blocks: Fisher 1935; Abadie, Diamond and
Hainmueller 2010 call borders that nothing happened at placebos).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_probe.stats.intervals import LEAST_CLUSTERS

Array = np.ndarray[Any, Any]

DRAWS = 9999
_BLOCK = 1 << 20


def placebo_p(values: Array, weights: Array | None = None, *, draws: int = DRAWS, seed: int = 0) -> float:
    """Two-sided p-value of "the first column is like the others".

    Args:
        values: `[clusters, 1 + placebos]`, the true border first. NaN: the cluster has no such border. A cluster
            without a true or without any placebo border takes no part.
        weights: of the clusters in the mean; None: equal.

    Returns:
        The share of draws, the observed one included (Phipson and Smyth 2010), whose mean is at least as far from that
        of all borders. NaN with fewer than six clusters.
    """
    x = np.asarray(values, dtype=np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    takes_part = ~np.isnan(x[:, 0]) & (~np.isnan(x[:, 1:])).any(1) & (w > 0)
    x, w = x[takes_part], w[takes_part]
    if len(x) < LEAST_CLUSTERS:
        return float("nan")
    here = ~np.isnan(x)
    count = here.sum(1)
    # Deviations from the cluster's own mean, those that exist first.
    apart = np.where(here, x - np.nanmean(x, 1, keepdims=True), np.nan)
    apart = np.take_along_axis(apart, np.argsort(~here, 1, kind="stable"), 1) * (w / w.sum())[:, None]
    observed = abs(float(apart[:, 0].sum()))
    reach = observed - 1e-12 * float(np.nansum(np.abs(apart)))  # sums of the same numbers in another order are equal
    rng = np.random.default_rng(seed)
    hits, rows = 1, max(1, _BLOCK // len(x))
    for start in range(0, draws, rows):
        drawn = rng.integers(0, count, (min(rows, draws - start), len(x)))
        hits += int((np.abs(apart[np.arange(len(x)), drawn].sum(1)) >= reach).sum())
    return hits / (draws + 1)


def within_sd(values: Array) -> float:
    """Standard deviation of one placebo border, pooled within clusters; NaN where no cluster has two.

    Args:
        values: placebo borders alone, `[clusters, placebos]`.
    """
    x = np.asarray(values, dtype=np.float64)
    x = x[(~np.isnan(x)).sum(1) >= 2]
    if not len(x):
        return float("nan")
    count = (~np.isnan(x)).sum(1)
    squares = np.nansum((x - np.nanmean(x, 1, keepdims=True)) ** 2, 1)
    return float(np.sqrt(squares.sum() / (count - 1).sum()))
