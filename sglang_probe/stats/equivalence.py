"""Equivalence: evidence that an effect is small, which a test that finds nothing is not."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from scipy.stats import t

Array = np.ndarray[Any, Any]


def two_one_sided_tests(differences: Array, margin: float) -> float:
    """p-value of "the mean lies outside (-margin, margin)", by two one-sided t tests (Schuirmann 1987).

    Args:
        differences: one per independent cluster, `[n]`.
        margin: stated beforehand, in the unit of the differences.

    Returns:
        Small: equivalent within the margin. NaN for fewer than two clusters.
    """
    d = np.asarray(differences, dtype=np.float64)
    n = len(d)
    if n < 2:
        return float("nan")
    mean, error = d.mean(), d.std(ddof=1) / np.sqrt(n)
    if error == 0:
        return 0.0 if abs(mean) < margin else 1.0
    below, above = t.sf((mean + margin) / error, n - 1), t.sf((margin - mean) / error, n - 1)
    return float(max(below, above))


def within(low: float, high: float, margin: float) -> Literal["equivalent", "different", "unresolved"]:
    """What an interval says of a margin: wholly inside, wholly outside, or neither. NaN is unresolved."""
    if -margin < low and high < margin:
        return "equivalent"
    if low >= margin or high <= -margin:
        return "different"
    return "unresolved"
