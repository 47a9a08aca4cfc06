"""Many tests at once: control of the false discovery rate."""

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
