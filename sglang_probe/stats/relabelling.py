"""The test of "the policy does nothing": what would be seen if the labels of the runs were exchanged?

Two arms run R times each, the r-th time in the r-th order. If the policy does nothing, the two runs of one order are
exchangeable: either could carry either label. Exchanging them turns every comparison *between* the arms across two
orders into one *within* an arm across the same two orders, and back. So the differences of the two kinds change sign,
and the test is exact, however skewed the distances are and whatever the order does (Fisher 1935; Pesarin 2001).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]

_ALL = 1 << 14
"""Combinations up to which all are tried."""
_BLOCK = 1 << 22


def relabelling_p(
    differences: Array,
    pairs: Sequence[tuple[int, int]] = ((0, 1),),
    *,
    alternative: Literal["greater", "less"] = "greater",
    resamples: int = 9999,
    seed: int = 0,
) -> float:
    """p-value of the sum of all differences, labels exchanged independently in every cluster and order.

    All combinations are tried up to 16,384 of them; beyond, a random draw, in which the observed labels count (Phipson
    and Smyth 2010). With two orders this is the sign-flip test.

    Args:
        differences: between-arm minus within-arm distance by cluster and pair of orders, `[n_clusters, n_pairs]`.
        pairs: the two orders of each pair.

    Returns:
        Never below one over the number of combinations; NaN without clusters.
    """
    d = np.asarray(differences, dtype=np.float64)
    n = len(d)
    if not n or np.isnan(d).any():
        return float("nan")
    d = d if alternative == "greater" else -d
    labels = _labels(pairs)
    # What a cluster adds under each of its labellings, `[n, m]`; the first is the observed one.
    adds = d @ labels.T
    observed = float(adds[:, 0].sum())
    reach = observed - 1e-12 * float(np.abs(d).sum())  # sums of the same numbers in another order are equal
    m = len(labels)
    if m**n <= _ALL:
        sums = np.zeros(1)
        for row in adds:
            sums = (sums[:, None] + row).ravel()
        return float((sums >= reach).mean())
    rng = np.random.default_rng(seed)
    hits, rows = 1, max(1, _BLOCK // n)
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, m, (min(rows, resamples - start), n))
        hits += int((adds[np.arange(n), drawn].sum(1) >= reach).sum())
    return hits / (resamples + 1)


def _labels(pairs: Sequence[tuple[int, int]]) -> Array:
    """Signs of the pairs under every exchange that matters, `[m, n_pairs]`: exchanging in all orders changes
    nothing."""
    orders = sorted({r for pair in pairs for r in pair})
    at = {r: i for i, r in enumerate(orders)}
    patterns = 1 - 2 * ((np.arange(2 ** (len(orders) - 1))[:, None] << 1 >> np.arange(len(orders))) & 1)
    return np.stack([patterns[:, at[i]] * patterns[:, at[j]] for i, j in pairs], 1).astype(np.float64)
