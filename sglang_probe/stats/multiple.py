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
