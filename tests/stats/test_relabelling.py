"""Exchanging the labels of runs: counted by hand, and exact whatever the order of requests does."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from sglang_probe.stats.relabelling import relabelling_p

LABELS = [(0, 0), (0, 1), (1, 0), (1, 1)]
THREE = [(0, 1), (0, 2), (1, 2)]


def p(d: list[float] | np.ndarray) -> float:
    return relabelling_p(np.asarray(d, float)[:, None])


def test_with_two_orders_signs_are_flipped() -> None:
    assert p([1.0, 2.0, 3.0]) == 1 / 8
    assert p([1.0, 2.0, -3.0]) == 5 / 8  # sums of 0 or more: 0, 0, 2, 4, 6
    assert p(np.zeros(5)) == 1.0
    assert np.isnan(p([]))
    assert relabelling_p(np.array([[1.0], [2.0], [3.0]]), alternative="less") == 1.0


def test_many_differences_agree_with_the_t_test() -> None:
    d = np.random.default_rng(0).normal(0.3, 1.0, 40)
    assert p(d) == pytest.approx(ttest_1samp(d, 0, alternative="greater").pvalue, abs=0.01)


def test_with_three_orders_an_exchange_turns_the_pairs_of_that_order_around() -> None:
    # Exchanging in order 0, 1 or 2 turns two of the three pairs around: 4, or 1 - 2 = -1 - ... each once.
    assert relabelling_p(np.array([[1.0, 2.0, 1.0]]), THREE) == 1 / 4
    # 1 + 1 - 5 = -3 as observed; the others are -1 - 1 - 5, -1 + 1 + 5, 1 - 1 + 5.
    assert relabelling_p(np.array([[1.0, 1.0, -5.0]]), THREE) == 3 / 4


@pytest.mark.parametrize("orders", [2, 3])
def test_runs_that_are_exchangeable_are_rejected_as_often_as_they_should(orders: int) -> None:
    """Between and within distances of runs that differ by order and by nothing else, heavily skewed."""
    rng = np.random.default_rng(orders)
    pairs = [(i, j) for i in range(orders) for j in range(i + 1, orders)]
    rejected = 0
    for _ in range(1000):
        runs = rng.lognormal(0, 1.0, (2, orders, 8, 3))
        far = {(a, b, i, j): np.linalg.norm(runs[a, i] - runs[b, j], axis=-1) for a, b in LABELS for i, j in pairs}
        between = [far[0, 1, i, j] + far[1, 0, i, j] for i, j in pairs]
        within = [far[0, 0, i, j] + far[1, 1, i, j] for i, j in pairs]
        d = (np.array(between) - np.array(within)).T
        rejected += relabelling_p(d, pairs, resamples=199) <= 0.05
    assert 0.03 <= rejected / 1000 <= 0.07
