"""Placebo borders: the test keeps its level however skewed the borders are, and finds what was planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sglang_probe.stats.placebo import placebo_p

STUDIES = 400


def rejected(clusters: int, planted: float, *, missing: bool = False) -> float:
    """Share of studies with p at most 0.05: families that differ in level and in spread, borders that are lognormal."""
    rng = np.random.default_rng(clusters)
    hits = 0
    for seed in range(STUDIES):
        values: Any = rng.normal(0, 2, (clusters, 1)) + rng.gamma(2, 0.5, (clusters, 1)) * rng.lognormal(
            0, 1, (clusters, 9)
        )
        if missing:
            values[:, 1:][rng.random((clusters, 8)) < 0.4] = np.nan
        values[:, 0] += planted
        hits += placebo_p(values, rng.integers(1, 5, clusters), draws=199, seed=seed) <= 0.05
    return hits / STUDIES


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("clusters", [6, 8, 12])
def test_a_true_border_that_is_like_the_others_is_rejected_as_often_as_it_should(clusters: int, missing: bool) -> None:
    assert 0.02 <= rejected(clusters, 0.0, missing=missing) <= 0.085  # 5 %, and 3 standard errors of 400 studies


def test_a_planted_excess_is_found_the_more_often_the_more_families_there_are() -> None:
    found = [rejected(n, 2.0) for n in (6, 12, 24)]
    assert found == sorted(found)
    assert found[-1] > 0.75
