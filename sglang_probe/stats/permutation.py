"""The sign-flip test: is the mean of paired differences above zero?"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_ALL_FLIPS = 14
"""Clusters up to which every pattern of signs is tried: 16,384 of them."""


def sign_flip(differences: Array, *, resamples: int = 9999, seed: int = 0) -> float:
    """One-sided p-value of "the mean is not above zero", by flipping the signs of independent differences.

    Exact if a difference is as likely as its negative under the null hypothesis (Fisher 1935, the paired design). All
    patterns are tried for up to 14 differences, a random draw beyond (Phipson and Smyth 2010: the observed one counts).

    Args:
        differences: one per cluster, `[n]`.

    Returns:
        The p-value, never below `2**-n`; NaN without any difference.
    """
    d = np.asarray(differences, dtype=np.float64)
    n = len(d)
    if n == 0:
        return float("nan")
    observed = d.sum()
    slack = 1e-12 * np.abs(d).sum()  # sums of the same numbers in another order are equal
    if n <= _ALL_FLIPS:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float(np.mean(signs @ d >= observed - slack))
    signs = np.random.default_rng(seed).choice([-1, 1], size=(resamples, n))
    return float((1 + np.sum(signs @ d >= observed - slack)) / (resamples + 1))
