"""Does ablating a feature do more than ablating a random one? Paired by prompt, with families of prompts as units.

A feature that was found by its attribution is ablated in prompts that it was not found in. Its loss is set against the
mean loss of random features that are as active; the difference is averaged within families, because prompts of one
family are no two observations. Intervals and p-values are `stats.intervals`', and Holm's method holds the chance of any
false finding over the features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.stats.intervals import LEAST_CLUSTERS, mean_intervals, mean_p
from sglang_probe.stats.multiple import holm

Array = np.ndarray[Any, Any]
LEVEL = 0.05


def family_means(value_CF: Array, family_C: Array) -> Array:
    """Means of cases within families, `[families, F]`."""
    return np.stack([value_CF[family_C == f].mean(0) for f in np.unique(family_C)])


def causal_tests(loss_CF: Array, random_CF: Array, family_C: Array) -> pd.DataFrame:
    """Test F features in C cases.

    Args:
        loss_CF: what the metric loses without each feature.
        random_CF: what it loses without a matched random one, the mean over them.
        family_C: family of each case.

    Returns:
        A row for each feature: `loss`, `random`, `difference`, each with `_low` and `_high`; `p` (two-sided), `p_holm`,
        `causal` (the difference is positive, and Holm's p at most 5 %). No intervals and no p with fewer than six
        families.
    """
    out: dict[str, Array] = {}
    both = {"loss": loss_CF, "random": random_CF, "difference": loss_CF - random_CF}
    for name, values in both.items():
        found = mean_intervals(family_means(values, family_C))
        out |= {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}
    frame = pd.DataFrame(out)
    frame["p"] = mean_p(family_means(both["difference"], family_C))
    frame["p_holm"] = holm(frame["p"].to_numpy())
    frame["causal"] = (frame["difference"] > 0) & (frame["p_holm"] <= LEVEL)
    return frame


def least_p(features: int, families: int) -> float:
    """The smallest `p_holm` that `causal_tests` can give so many features in so many families."""
    return min(1.0, features * 2.0 ** (1 - families))


def halves(family_C: Array, rng: np.random.Generator) -> Array | None:
    """Which cases are for finding features, bool `[C]`: half of the families; None if that leaves too few for a test on
    either side."""
    names = np.unique(family_C)
    if len(names) < 2 * LEAST_CLUSTERS:
        return None
    first = rng.permutation(names)[: len(names) // 2]
    return np.isin(family_C, first)


def alike(activity_M: Array, feature: int, count: int, taken: set[int], rng: np.random.Generator) -> list[int]:
    """Up to `count` random active features, of the `4 count` whose activity is nearest to that of one.

    Args:
        activity_M: mean length that each feature writes into a prompt; 0: it never fires.
        taken: features that are not drawn.
    """
    active = np.flatnonzero(activity_M > 0)
    pool = np.array([f for f in active if f not in taken], dtype=np.int64)
    if not len(pool):
        return []
    far = np.abs(np.log(activity_M[pool]) - np.log(max(activity_M[feature], 1e-30)))
    near = pool[np.argsort(far, kind="stable")[: 4 * count]]
    return [int(f) for f in rng.permutation(near)[:count]]
