"""The interval of a handful of clusters: its formula by hand, its refusals, and how often it covers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from sglang_probe.stats.intervals import (
    LEAST_CLUSTERS,
    cluster_interval,
    jackknife_interval,
    mean_intervals,
    mean_p,
    ratio_intervals,
)

Array = np.ndarray[Any, Any]


def test_of_clusters_without_skewness_it_is_students() -> None:
    x = np.array([1.0, 2, 3, 5, 6, 7])[:, None]
    found = mean_intervals(x)
    error = x.std(ddof=1) / np.sqrt(6)
    reach = student.ppf(0.975, 5) * error
    assert (found.estimate[0], found.low[0], found.high[0]) == pytest.approx((4, 4 - reach, 4 + reach))
    assert mean_p(x - 3)[0] == pytest.approx(ttest_1samp(x[:, 0], 3).pvalue)


def test_skewed_clusters_reach_farther_to_their_long_side_and_never_less_far_than_students() -> None:
    x = np.array([1.0, 1, 1.2, 1.3, 1.4, 2, 9])[:, None]
    found = mean_intervals(x)
    reach = student.ppf(0.975, 6) * x.std(ddof=1) / np.sqrt(7)
    assert found.low[0] == pytest.approx(x.mean() - reach)
    assert found.high[0] > x.mean() + 1.5 * reach
    mirrored = mean_intervals(-x)
    assert (mirrored.low[0], mirrored.high[0]) == pytest.approx((-found.high[0], -found.low[0]))


def test_a_p_value_is_at_most_5_percent_where_the_interval_leaves_out_zero() -> None:
    x = np.random.default_rng(0).lognormal(0, 0.5, (9, 2000)) - 0.6
    found = mean_intervals(x)
    assert np.array_equal(mean_p(x) <= 0.05, (found.low > 0) | (found.high < 0))
    assert 0.2 < (mean_p(x) <= 0.05).mean() < 0.8


@pytest.mark.parametrize("clusters", [2, 4, 5])
def test_with_five_clusters_there_is_neither_interval_nor_test(clusters: int) -> None:
    x = np.arange(float(clusters))[:, None]
    found = mean_intervals(x)
    assert found.estimate[0] == x.mean()
    assert np.isnan([found.low[0], found.high[0], mean_p(x)[0]]).all()
    assert np.isfinite(mean_intervals(np.arange(float(LEAST_CLUSTERS))[:, None]).low[0])


def test_a_missing_unit_takes_no_part_in_its_column_alone() -> None:
    x = np.random.default_rng(1).normal(size=(8, 2))
    with_gap = x.copy()
    with_gap[7, 0] = np.nan
    found, shorter, whole = mean_intervals(with_gap), mean_intervals(x[:7]), mean_intervals(x)
    assert (found.low[0], found.high[0]) == pytest.approx((shorter.low[0], shorter.high[0]))
    assert (found.low[1], found.high[1]) == (whole.low[1], whole.high[1])
    assert np.isnan(mean_intervals(np.full((8, 1), np.nan)).estimate[0])


def test_clusters_that_do_not_vary_have_no_interval() -> None:
    """32 answers of 32 are right: that does not make it certain that all are."""
    found = mean_intervals(np.full((32, 2), [1.0, 0.1]))
    assert found.estimate == pytest.approx([1.0, 0.1])
    assert np.isnan(found.low).all()
    assert mean_p(np.full((8, 1), 0.3))[0] == 2**-7
    assert mean_p(np.zeros((8, 1)))[0] == 1.0


def test_what_one_cluster_holds_alone_has_no_interval() -> None:
    counts = np.array([[3.0, 10]] + [[0, 10]] * 9)
    found = cluster_interval(counts, lambda s: np.log(s[..., :1] / s[..., 1:]))
    assert np.isfinite(found.estimate[0])
    assert np.isnan(found.low[0])
    assert np.isnan(found.high[0])


def test_a_ratio_of_sums_is_the_same_from_columns_and_from_clusters() -> None:
    rng = np.random.default_rng(2)
    n = rng.integers(5, 15, 9).astype(float)
    total = n * rng.normal(1, 0.3, 9)
    columns = ratio_intervals(total[:, None], n[:, None])
    clusters = cluster_interval(np.stack([total, n], 1), lambda s: s[..., :1] / s[..., 1:])
    assert (columns.low[0], columns.high[0]) == pytest.approx((clusters.low[0], clusters.high[0]))


def test_an_interval_stays_within_what_is_possible() -> None:
    found = jackknife_interval(np.float64(0.9), np.linspace(0.85, 0.95, 7), bounds=(0.0, 1.0))
    assert found.high == 1.0


COUNTS = (6, 8, 12, 24, 48)
STUDIES = 4000

POPULATIONS: dict[str, tuple[Callable[[np.random.Generator, tuple[int, int]], Array], float]] = {
    "normal": (lambda g, s: g.normal(1, 1, s), 1.0),
    "exponential": (lambda g, s: g.exponential(1, s), 1.0),
    "lognormal, sigma 1/2": (lambda g, s: g.lognormal(0, 0.5, s), float(np.exp(1 / 8))),
    "share of 7 right, 30 %": (lambda g, s: g.binomial(7, 0.3, s) / 7, 0.3),
    "share of 7 right, prompts differ": (lambda g, s: g.binomial(7, g.beta(1, 2, s)) / 7, 1 / 3),
}


@pytest.mark.parametrize("clusters", COUNTS)
@pytest.mark.parametrize("name", POPULATIONS)
def test_the_interval_of_a_mean_covers_and_its_test_keeps_its_level(name: str, clusters: int) -> None:
    """4,000 studies: the standard error of a coverage of 94 % is 0.4 %."""
    draw, truth = POPULATIONS[name]
    x = draw(np.random.default_rng(clusters), (clusters, STUDIES))
    found = mean_intervals(x)
    assert np.mean((found.low <= truth) & (truth <= found.high)) >= 0.93
    assert np.mean(mean_p(x - truth) <= 0.05) <= 0.07


@pytest.mark.parametrize("clusters", COUNTS)
def test_the_interval_of_a_ratio_of_families_of_unlike_sizes_covers(clusters: int) -> None:
    g = np.random.default_rng(100 + clusters)
    shape = (clusters, STUDIES)
    size = g.integers(5, 40, shape).astype(float)
    total = size * g.lognormal(0, 0.5, shape)
    found = ratio_intervals(total, size)
    truth = float(np.exp(1 / 8))
    assert np.mean((found.low <= truth) & (truth <= found.high)) >= 0.93


def test_where_a_few_clusters_hold_nearly_everything_it_still_covers_nine_times_in_ten() -> None:
    """Lognormal with a sigma of 1: no interval of six clusters covers 95 % there; percentiles cover 74 %."""
    for clusters in COUNTS:
        x = np.random.default_rng(200 + clusters).lognormal(0, 1, (clusters, STUDIES))
        found = mean_intervals(x)
        assert np.mean((found.low <= np.exp(0.5)) & (np.exp(0.5) <= found.high)) >= 0.89
