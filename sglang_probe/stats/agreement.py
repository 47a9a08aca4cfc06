"""Does one quantity rank things as another does? Spearman's correlation over policies, with an interval over policies.

The question behind such a table is how the next method would be ranked, so the policies are the sample; the cells
(tasks, budgets) are what they were tried in, and share the policies. An interval over prompts would be narrow and
answer another question: how well the correlation of *these* policies is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

Array = np.ndarray[Any, Any]


def spearman(x: Array, y: Array) -> Array:
    """Spearman's rank correlation along the last axis, ties at their mean rank; NaN where one side is constant."""
    rx, ry = (rankdata(v, axis=-1) for v in (x, y))
    rx, ry = (r - r.mean(-1, keepdims=True) for r in (rx, ry))
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = (rx * ry).sum(-1) / np.sqrt((rx**2).sum(-1) * (ry**2).sum(-1))
    return np.round(rho, 12)  # ranks are whole or half: what is smaller comes from rounding


def without_each(x: Array, y: Array) -> Array:
    """Spearman over policies, and the same without each policy in turn, `[1 + policies]`.

    Args:
        x, y: `[policies]`; NaN where there is none.
    """
    here = ~(np.isnan(x) | np.isnan(y))
    n = int(here.sum())
    if n < 2:
        return np.full(1 + len(x), np.nan)
    whole = float(spearman(x[here], y[here]))
    rest = ~np.eye(n, dtype=bool)
    less = spearman(*(np.broadcast_to(v[here], (n, n))[rest].reshape(n, n - 1) for v in (x, y)))
    out = np.full(1 + len(x), whole)
    out[1:][here] = less
    return out


def mean_spearman(cells: Sequence[Array]) -> tuple[float, Array]:
    """The mean of `without_each` over cells, as `sglang_probe.stats.intervals.jackknife_interval` takes it: a number
    and `[policies]`. Cells in which a side is constant are left out of a mean; NaN and infinite where all are."""
    found = np.stack(cells)
    here = ~np.isnan(found)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(here, found, 0.0).sum(0) / here.sum(0)
    return float(means[0]), np.where(np.isnan(means[1:]), np.inf, means[1:])
