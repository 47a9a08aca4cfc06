"""Small statistics, against values that can be counted by hand or derived."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_probe.stats.bootstrap import cluster_bootstrap
from sglang_probe.stats.equivalence import within
from sglang_probe.stats.multiple import benjamini_hochberg


def test_adjusted_p_values_are_those_of_the_step_up_rule() -> None:
    assert benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    with_gap = benjamini_hochberg(np.array([[0.01, np.nan], [0.04, np.nan]]))
    assert with_gap[:, 0] == pytest.approx([0.02, 0.04])
    assert np.isnan(with_gap[:, 1]).all()


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
