"""Does one quantity rank things as another does? Spearman's correlation with an interval over the units of both.

Noise of either side pulls a rank correlation towards 0, and drawing units with replacement adds as much noise again:
the draws lie below the estimate, and their percentiles may leave it out. So the interval is the estimate plus or minus
the draws' standard deviation times the normal quantile. It says how well the correlation of the means at hand is known;
that of means over endless units is larger, by 0.01 to 0.05 in simulations of six cells of 21 policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata

from sglang_probe.stats.bootstrap import Interval
from sglang_probe.stats.paired import draws

Array = np.ndarray[Any, Any]


def spearman(x: Array, y: Array) -> Array:
    """Spearman's rank correlation along the last axis, ties at their mean rank; NaN where one side is constant."""
    rx, ry = (rankdata(v, axis=-1) for v in (x, y))
    rx, ry = (r - r.mean(-1, keepdims=True) for r in (rx, ry))
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = (rx * ry).sum(-1) / np.sqrt((rx**2).sum(-1) * (ry**2).sum(-1))
    return np.round(rho, 12)  # ranks are whole or half: what is smaller comes from rounding


def mean_spearman(
    cells: Sequence[tuple[Array, Array]],
    groups: Sequence[int],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Spearman over policies in each cell, averaged over the cells, with a bootstrap interval over units.

    Args:
        cells: pairs `[policies, units]`: the metric and the outcome of every policy and unit of a cell. Policies are
            ranked by their means over units.
        groups: of each cell. Cells of one group share their units, and so their draws; groups are independent.

    Returns:
        Scalars. Cells in which a side is constant are left out of a mean; NaN where all are.
    """
    found = np.empty((resamples, len(cells)))
    for i, (metric, outcome) in enumerate(cells):
        for start, drawn in draws(metric.shape[1], resamples, seed=seed + groups[i]):
            weight = drawn / drawn.sum(1, keepdims=True)
            found[start : start + len(drawn), i] = spearman(weight @ metric.T, weight @ outcome.T)
    estimates = np.array([float(spearman(m.mean(1), o.mean(1))) for m, o in cells])
    estimate = _nanmean(estimates[None], 1)[0]
    means = _nanmean(found, 1)
    means = means[~np.isnan(means)]
    reach = norm.ppf((1 + confidence) / 2) * (means.std() if len(means) else np.nan)
    low, high = np.clip([estimate - reach, estimate + reach], -1, 1)
    return Interval(estimate, np.asarray(low), np.asarray(high))


def _nanmean(x: Array, axis: int) -> Array:
    here = ~np.isnan(x)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(here, x, 0.0).sum(axis) / here.sum(axis))
