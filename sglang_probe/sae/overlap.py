"""Which features two regimes of rows use, each statistic beside what it gives where the regimes do not differ.

Overlap and rank correlation of rates fall with the number of rows alone: 0.71 of the hundred commonest features shared
means nothing without the value of two halves of one regime at the same number of rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from sglang_probe.errors import ConfigError
from sglang_probe.stats.intervals import LEAST_CLUSTERS, mean_p
from sglang_probe.stats.multiple import benjamini_hochberg

Array = np.ndarray[Any, Any]
_LEAST_RATE = 0.002


def commonest_overlap(first_M: Array, second_M: Array, n: int = 100) -> float:
    """Jaccard of the `n` latents that fire most in each regime, given rates or counts `[M]`. Ties: by number."""
    sets = [set(np.argsort(-x, kind="stable")[:n].tolist()) for x in (first_M, second_M)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def rank_correlation(first_M: Array, second_M: Array) -> float:
    """Spearman's correlation of rates, over latents that fire in either regime; NaN with fewer than three."""
    alive = (first_M > 0) | (second_M > 0)
    return float(spearmanr(first_M[alive], second_M[alive])[0]) if alive.sum() >= 3 else float("nan")


def overlap(first: Array, second: Array, *, n: int = 100, draws: int = 200, seed: int = 0) -> dict[str, float]:
    """Overlap and rank correlation of two regimes of the same texts, with both nulls.

    Args:
        first, second: rows in which each latent fires, by text, `[T, M]`. A text should have as many rows in one
            regime as in the other, else exchanging the two exchanges its weight too.

    Returns:
        `jaccard` and `rank` of all texts; `*_swapped` (mean) and `*_swapped_low` (5 % quantile) with the two regimes
        exchanged at random within texts, and the p-value `*_p` of a value as low; and at equal numbers of texts
        `*_halves` (half of the first regime's texts against the other half) beside `*_across` (half of the first
        against the other half of the second).

    Raises:
        ConfigError: the shapes differ, or there are fewer than six texts.
    """
    texts = len(first)
    if first.shape != second.shape or texts < LEAST_CLUSTERS:
        raise ConfigError(
            f"regimes of {first.shape} and {second.shape} cannot be compared", fix="at least six texts, in both"
        )
    rng = np.random.default_rng(seed)

    def both(a: Array, b: Array) -> Array:
        x, y = a.sum(0), b.sum(0)
        return np.array([commonest_overlap(x, y, n), rank_correlation(x, y)])

    observed = both(first, second)
    swapped, halves, across = (np.empty((draws, 2)) for _ in range(3))
    for i in range(draws):
        exchange = rng.random(texts) < 0.5
        a, b = (np.where(exchange[:, None], x, y) for x, y in ((second, first), (first, second)))
        swapped[i] = both(a, b)
        half = np.zeros(texts, dtype=bool)
        half[rng.permutation(texts)[: texts // 2]] = True
        halves[i] = both(first[half], first[~half])
        across[i] = both(first[half], second[~half])
    out: dict[str, float] = {}
    for at, name in enumerate(("jaccard", "rank")):
        out |= {
            name: float(observed[at]),
            f"{name}_swapped": float(swapped[:, at].mean()),
            f"{name}_swapped_low": float(np.quantile(swapped[:, at], 0.05)),
            # The observed labels are one of the exchanges (Phipson and Smyth 2010).
            f"{name}_p": float((1 + (swapped[:, at] <= observed[at] + 1e-12).sum()) / (draws + 1)),
            f"{name}_halves": float(halves[:, at].mean()),
            f"{name}_across": float(across[:, at].mean()),
        }
    return out


def rate_drift(first: Array, second: Array, rows: tuple[Array, Array]) -> pd.DataFrame:
    """Which latents fire more, or less, in the second regime: of each the paired difference of rates by text, tested
    against zero (`stats.intervals.mean_p`), with control of the false discovery rate.

    Args:
        first, second: as `overlap`.
        rows: rows by text of each regime, `[T]` each.

    Returns:
        Of latents with a rate of 0.2 % in either regime: `latent`, `rate_first`, `rate_second`, `log2` (of the ratio,
        one row's worth added to both), `p`, `q` (Benjamini and Hochberg).
    """
    if first.shape != second.shape or len(first) < LEAST_CLUSTERS:
        raise ConfigError(f"regimes of {first.shape} and {second.shape} cannot be tested: at least six texts, in both")
    rates = [x.sum(0) / n.sum() for x, n in ((first, rows[0]), (second, rows[1]))]
    tested = np.flatnonzero(np.maximum(*rates) >= _LEAST_RATE)
    p = mean_p(second[:, tested] / rows[1][:, None] - first[:, tested] / rows[0][:, None])
    c = [1 / n.sum() for n in rows]
    return pd.DataFrame(
        {
            "latent": tested,
            "rate_first": rates[0][tested],
            "rate_second": rates[1][tested],
            "log2": np.log2((rates[1][tested] + c[1]) / (rates[0][tested] + c[0])),
            "p": p,
            "q": benjamini_hochberg(p),
        }
    )
