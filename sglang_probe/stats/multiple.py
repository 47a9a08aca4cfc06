"""Many tests at once: control of the false discovery rate, and of any false rejection."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import false_discovery_control

Array = np.ndarray[Any, Any]


def benjamini_hochberg(p: Array) -> Array:
    """Adjusted p-values (Benjamini and Hochberg 1995), of the shape of `p`; NaN stays NaN and is not counted.

    Rejecting where the result is at most q keeps the expected share of false rejections at q, for tests that are
    independent or positively dependent.
    """
    p = np.asarray(p, dtype=np.float64)
    out = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        out[tested] = false_discovery_control(p[tested], method="bh")
    return out


def holm(p: Array) -> Array:
    """Adjusted p-values (Holm 1979), of the shape of `p`; NaN stays NaN and is not counted.

    Rejecting where the result is at most alpha keeps the chance of any false rejection at alpha, whatever the tests
    depend on.
    """
    p = np.asarray(p, dtype=np.float64)
    out = np.full(p.shape, np.nan)
    tested = ~np.isnan(p)
    found = p[tested]
    order = np.argsort(found, kind="stable")
    stepped = np.maximum.accumulate(found[order] * np.arange(len(found), 0, -1))
    adjusted = np.empty_like(found)
    adjusted[order] = np.minimum(stepped, 1.0)
    out[tested] = adjusted
    return out


def sign_flip_max(values: Array, *, draws: int = 20_000, seed: int = 0) -> Array:
    """Adjusted one-sided p-values of "units of the column are symmetric about zero, or lower", `[k]`, for `values`
    `[n_units, k]`.

    The signs of whole units are flipped, all columns of a unit alike, and each column is put against the largest of
    those not rejected before it (Westfall and Young 1993, step-down): columns that go together, as ways of reuse that
    are asked of the same cases do, are not paid for twice. The statistic is the sum over the root of the sum of
    squares, which no flip changes; so a column of equal numbers has one, too. All `2**n` patterns up to 14 units, else
    `draws` of them. Rejecting where the result is at most alpha keeps the chance of any false rejection at alpha under
    that null. "The mean is not above zero" is another one, and is rejected too often where most units are a little
    above zero and few far below (`bench/gate.py` has how often).

    NaN: a unit that the column has nothing of; a column of zeros has p = 1.
    """
    values = np.asarray(values, dtype=np.float64)
    filled = np.nan_to_num(values, nan=0.0)
    root = np.sqrt((filled**2).sum(0))
    unit = filled / np.where(root > 0, root, 1.0)
    n = len(unit)
    if n <= 14:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, n))
        signs[0] = 1.0  # what was seen is one of the patterns
    flipped, seen = signs @ unit, unit.sum(0)
    out, least = np.ones(unit.shape[1]), 0.0
    left = [int(j) for j in np.argsort(-seen, kind="stable") if root[j] > 0]
    while left:
        highest = flipped[:, left].max(1)
        j = left.pop(0)
        least = max(least, float((highest >= seen[j] - 1e-9).mean()))
        out[j] = least
    return out
