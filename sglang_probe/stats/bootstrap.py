"""The cluster bootstrap: intervals for statistics of sums over clusters that are independent of each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Interval:
    """An estimate and its percentile interval; arrays of the statistic's shape."""

    estimate: Array
    low: Array
    high: Array


def cluster_bootstrap(
    values: Array,
    statistic: Callable[[Array], Array],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a statistic of summed cluster totals, clusters drawn with replacement (Efron 1979).

    Args:
        values: per-cluster sums, `[n_clusters, k]`.
        statistic: from summed totals `[..., k]` to `[..., m]`, vectorised over leading axes.
    """
    n = len(values)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    found = statistic(drawn.astype(np.float64) @ values)
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail], axis=0)
    return Interval(statistic(values.sum(axis=0)), low, high)
