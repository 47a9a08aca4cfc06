"""How the harvested set departs from the traffic, class by class, and the weights that mend it.

The harvested set is one row for each computed position. With the share p of a class in traffic and q in the harvest,
its bias is log2(q / p): -1 means that the class has half the share in the harvest that it has in traffic. Intervals are
over prefix families (`sglang_probe.stats.intervals`). The weight of a class is the number of occurrences in traffic
for each of its rows; rows so weighted have the class frequencies of the traffic, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_probe.stats.divergence import jensen_shannon
from sglang_probe.stats.intervals import LEAST_CLUSTERS, cluster_interval

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Bias:
    """Arrays have one entry a class, K of them."""

    traffic_share: Array
    harvest_share: Array
    log2_ratio: Array
    """-inf for a class of which nothing was computed."""
    low: Array
    """95 % interval; NaN where fewer than six families have the class, or one holds all of it that was computed."""
    high: Array
    weight: Array
    """Occurrences in traffic for each computed position; NaN for a class of which nothing was computed."""
    divergence: float
    """Jensen-Shannon divergence of the two sets of shares, in bits."""
    effective_rows: float
    """Kish's effective sample size of the computed positions under these weights."""
    lost_share: float
    """Share of the traffic in classes of which nothing was computed: no weight can mend that."""


def bias_of(positions: Array, computed: Array) -> Bias:
    """Bias by class.

    Args:
        positions: occurrences in traffic, int64 [groups of families, K].
        computed: those that were computed, likewise.
    """
    k = positions.shape[1]
    traffic, harvest = positions.sum(axis=0), computed.sum(axis=0)
    total, rows = int(traffic.sum()), int(harvest.sum())
    if not rows:
        nothing = np.full(k, np.nan)
        lost = 1.0 if total else float("nan")
        return Bias(
            traffic / max(total, 1), nothing, np.full(k, -np.inf), nothing, nothing, nothing, float("nan"), 0.0, lost
        )
    interval = cluster_interval(np.concatenate([computed, positions], axis=1).astype(np.float64), log2_ratios)
    enough = (positions > 0).sum(axis=0) >= LEAST_CLUSTERS
    low, high = (np.where(enough, x, np.nan) for x in (interval.low, interval.high))
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.where(harvest > 0, traffic / harvest, np.nan)
    held = harvest > 0
    return Bias(
        traffic_share=traffic / total,
        harvest_share=harvest / rows,
        log2_ratio=log2_ratios(np.concatenate([harvest, traffic]).astype(np.float64)),
        low=low,
        high=high,
        weight=weight,
        divergence=jensen_shannon(traffic, harvest),
        effective_rows=float(traffic[held].sum() ** 2 / (traffic[held] * weight[held]).sum()),
        lost_share=float(traffic[~held].sum() / total),
    )


def log2_ratios(sums: Array) -> Array:
    """log2 of harvest share over traffic share, `[..., K]`, from counts `[..., 2 K]`: computed, then positions."""
    k = sums.shape[-1] // 2
    harvest, traffic = sums[..., :k], sums[..., k:]
    with np.errstate(divide="ignore", invalid="ignore"):
        q = harvest / harvest.sum(axis=-1, keepdims=True)
        p = traffic / traffic.sum(axis=-1, keepdims=True)
        return np.asarray(np.log2(q / p))
