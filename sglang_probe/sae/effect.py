"""What replacing rows by something else does to a model's predictions, on a scale with two ends.

    recovered = (L_nothing - L_spliced) / (L_nothing - L_clean)

with L the mean cross-entropy of the tokens that follow, and `nothing` a row of zeros or, which is stricter, the mean
row (SAELens and SAEBench call it "loss recovered"). 1: nothing is lost. It says little where the scale is long: a KL
of half a nat is 0.97 of the way from zeros. So beside it stand the KL divergence itself, and that of errors of the same
length in random directions: SAE errors are often worse than those (Gurnee 2024).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_probe.stats.intervals import Interval, cluster_interval

Array = np.ndarray[Any, Any]


def recovered(clean_T: Array, spliced_T: Array, nothing_T: Array, rows_T: Array) -> Interval:
    """Share of the cross-entropy that is kept, with an interval over texts.

    Args:
        clean_T, spliced_T, nothing_T: sums of cross-entropies by text. rows_T: their numbers; each is positive.
    """
    sums = np.stack([clean_T, spliced_T, nothing_T, rows_T], axis=1)
    return cluster_interval(sums, lambda s: (s[..., 2:3] - s[..., 1:2]) / (s[..., 2:3] - s[..., 0:1]))


def ratio(above_T: Array, below_T: Array) -> Interval:
    """Ratio of two sums over texts, none of them negative, e.g. of the KL of an SAE's errors to that of random ones."""
    sums = np.stack([above_T, below_T], axis=1)
    return cluster_interval(sums, lambda s: s[..., :1] / s[..., 1:], bounds=(0.0, np.inf))


def mean(sums_T: Array, rows_T: Array) -> Interval:
    """Mean over rows of what is never negative, with an interval over texts; texts without rows take no part."""
    some = rows_T > 0
    return ratio(sums_T[some], rows_T[some])


def difference(first_T: Array, first_rows_T: Array, second_T: Array, second_rows_T: Array) -> Interval:
    """Mean over rows of the second arm minus that of the first, paired by text."""
    some = (first_rows_T > 0) & (second_rows_T > 0)
    sums = np.stack([x[some] for x in (first_T, first_rows_T, second_T, second_rows_T)], axis=1)
    return cluster_interval(sums, lambda s: s[..., 2:3] / s[..., 3:4] - s[..., 0:1] / s[..., 1:2])
