"""How far two distributions are apart."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def jensen_shannon(p: Array, q: Array) -> float:
    """Jensen-Shannon divergence in bits (Lin 1991): 0 for equal distributions, 1 for disjoint ones.

    Args:
        p: non-negative weights over the same classes as `q`; both are normalised.
    """
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    p, q = p / p.sum(), q / q.sum()
    m = (p + q) / 2

    def relative_entropy(a: Array) -> float:
        at = a > 0
        return float(np.sum(a[at] * np.log2(a[at] / m[at])))

    return (relative_entropy(p) + relative_entropy(q)) / 2
