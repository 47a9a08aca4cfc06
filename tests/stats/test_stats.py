"""Small statistics, against values that can be counted by hand or derived."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from sglang_probe.stats.bootstrap import cluster_bootstrap
from sglang_probe.stats.equivalence import within
from sglang_probe.stats.multiple import benjamini_hochberg
from sglang_probe.stats.permutation import sign_flip


def test_adjusted_p_values_are_those_of_the_step_up_rule() -> None:
    assert benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    with_gap = benjamini_hochberg(np.array([[0.01, np.nan], [0.04, np.nan]]))
    assert with_gap[:, 0] == pytest.approx([0.02, 0.04])
    assert np.isnan(with_gap[:, 1]).all()


def test_sign_flips_are_counted() -> None:
    assert sign_flip(np.array([1.0, 2.0, 3.0])) == 1 / 8
    assert sign_flip(np.array([1.0, 2.0, -3.0])) == 5 / 8  # sums of 0 or more: 0, 0, 2, 4, 6
    assert sign_flip(np.zeros(5)) == 1.0
    assert np.isnan(sign_flip(np.array([])))


def test_sign_flips_of_many_differences_agree_with_the_t_test() -> None:
    d = np.random.default_rng(0).normal(0.3, 1.0, 40)
    assert sign_flip(d) == pytest.approx(ttest_1samp(d, 0, alternative="greater").pvalue, abs=0.01)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(-0.1, 0.1, "equivalent"), (0.3, 0.5, "different"), (-0.5, -0.2, "different"), (0.1, 0.3, "unresolved")],
)
def test_an_interval_against_a_margin(low: float, high: float, said: str) -> None:
    assert within(low, high, 0.2) == said
    assert within(float("nan"), float("nan"), 0.2) == "unresolved"


def test_cluster_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for i in range(300):
        sizes = rng.integers(5, 15, 24)
        means = rng.normal(1.0, 0.5, 24)  # clusters differ, so that rows are not independent
        values = np.stack([means * sizes, sizes], axis=1)
        interval = cluster_bootstrap(values, lambda s: s[..., 0] / s[..., 1], resamples=400, seed=i)
        covered += bool(interval.low <= 1.0 <= interval.high)
    assert 0.90 <= covered / 300 <= 0.98
