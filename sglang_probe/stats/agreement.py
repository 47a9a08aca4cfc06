"""Does one quantity rank things as another does? Spearman's correlation with an interval over the units behind both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

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
    """Spearman over policies in each cell, averaged over the cells, with a percentile interval over units.

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
    tail = (1 - confidence) / 2
    means = _nanmean(found, 1)
    means = means[~np.isnan(means)]
    low, high = np.quantile(means, [tail, 1 - tail]) if len(means) else (np.nan, np.nan)
    return Interval(_nanmean(estimates[None], 1)[0], np.asarray(low), np.asarray(high))


def _nanmean(x: Array, axis: int) -> Array:
    here = ~np.isnan(x)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(here, x, 0.0).sum(axis) / here.sum(axis))
