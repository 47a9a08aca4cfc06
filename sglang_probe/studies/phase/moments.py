"""Moments, norms and outliers of rows, with intervals over texts."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_probe.stats.intervals import cluster_interval

Array = np.ndarray[Any, Any]

BAND = 0.999
"""Share of a dimension's reference entries that count as ordinary; an outlier lies outside the central band."""


def reference_band(rows_TCD: Array) -> tuple[Array, Array]:
    """Per dimension, the lower and upper end of the central `BAND` of the reference, `[width]` each."""
    flat = rows_TCD.reshape(-1, rows_TCD.shape[-1])
    low, high = np.quantile(flat, [(1 - BAND) / 2, (1 + BAND) / 2], axis=0)
    return low, high


def describe(rows_TCD: Array, band: tuple[Array, Array], family: Array | None = None) -> dict[str, float]:
    """What one kind of rows looks like.

    Args:
        rows_TCD: `[texts, positions, width]`.
        family: of each text, `[texts]`; None: each its own.
        band: of other texts than these, so that the reference is not its own judge.

    Returns:
        `norm` and `outliers` (share of entries outside the band) with 95 % intervals over families;
        `mean` (root mean square over dimensions of the mean row), `variance` (mean over dimensions), and `kurtosis`
        (excess, median over dimensions).
    """
    flat = rows_TCD.reshape(-1, rows_TCD.shape[-1]).astype(np.float64)
    mean = flat.mean(axis=0)
    centred = flat - mean
    variance = (centred**2).mean(axis=0)
    kurtosis = (centred**4).mean(axis=0) / np.maximum(variance**2, np.finfo(float).tiny) - 3
    norms = np.linalg.norm(rows_TCD, axis=-1)
    outside = ((rows_TCD < band[0]) | (rows_TCD > band[1])).mean(axis=-1)
    n = np.full(len(rows_TCD), rows_TCD.shape[1], dtype=np.float64)
    sums = np.stack([norms.sum(axis=1), outside.sum(axis=1), n], axis=1)
    names, at = np.unique(np.arange(len(sums)) if family is None else family, return_inverse=True)
    totals = np.zeros((len(names), 3))
    np.add.at(totals, at, sums)
    interval = cluster_interval(totals, lambda s: s[..., :2] / s[..., 2:])
    return {
        "norm": float(interval.estimate[0]),
        "norm_low": float(interval.low[0]),
        "norm_high": float(interval.high[0]),
        "mean": float(np.sqrt((mean**2).mean())),
        "variance": float(variance.mean()),
        "kurtosis": float(np.median(kurtosis)),
        "outliers": float(interval.estimate[1]),
        "outliers_low": float(interval.low[1]),
        "outliers_high": float(interval.high[1]),
    }
