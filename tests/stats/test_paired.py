"""Paired statistics of many cells at once, against the functions for one cell and against enumeration."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr, ttest_1samp

from sglang_probe.stats.agreement import mean_spearman, spearman
from sglang_probe.stats.multiple import holm
from sglang_probe.stats.paired import mean_intervals, ratio_intervals, sign_flips


def test_holm_is_the_step_down_rule() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with_gap = holm(np.array([0.5, np.nan, 0.9]))
    assert with_gap[[0, 2]] == pytest.approx([1.0, 1.0])
    assert np.isnan(with_gap[1])


def greater(d: np.ndarray) -> float:
    """One-sided p-value of one column."""
    return float(sign_flips(d[:, None], alternative="greater")[0])


@pytest.mark.parametrize("n", [5, 20])
def test_columns_are_tested_as_they_are_alone_and_on_both_sides(n: int) -> None:
    d = np.random.default_rng(0).normal(0.4, 1.0, (n, 3))
    both = sign_flips(np.concatenate([d, -d], axis=1), seed=1)
    assert both[:3] == pytest.approx(both[3:], abs=0.02 if n > 14 else 0)
    for i in range(3):
        smaller = min(greater(d[:, i]), greater(-d[:, i]))
        assert both[i] == pytest.approx(2 * smaller, abs=0.02 if n > 14 else 1e-12)


def test_two_sided_flips_are_counted() -> None:
    assert sign_flips(np.array([[1.0], [2.0], [3.0]]))[0] == 2 / 8
    assert sign_flips(np.array([[0.0], [0.0]]))[0] == 1.0
    assert np.isnan(sign_flips(np.full((4, 1), np.nan))[0])


def test_one_sided_flips_are_counted() -> None:
    assert greater(np.array([1.0, 2.0, 3.0])) == 1 / 8
    assert greater(np.array([1.0, 2.0, -3.0])) == 5 / 8  # sums of 0 or more: 0, 0, 2, 4, 6
    assert greater(np.zeros(5)) == 1.0
    assert np.isnan(greater(np.array([])))


def test_one_sided_flips_of_many_differences_agree_with_the_t_test() -> None:
    d = np.random.default_rng(0).normal(0.3, 1.0, 40)
    assert greater(d) == pytest.approx(ttest_1samp(d, 0, alternative="greater").pvalue, abs=0.01)


def test_the_bootstrap_of_two_units_has_the_three_means_it_can_have() -> None:
    interval = mean_intervals(np.array([[0.0, 5.0], [1.0, 5.0]]), resamples=4000)
    assert interval.estimate == pytest.approx([0.5, 5.0])
    assert interval.low == pytest.approx([0.0, 5.0])
    assert interval.high == pytest.approx([1.0, 5.0])


def test_a_missing_unit_takes_no_part_in_its_column_alone() -> None:
    values = np.array([[1.0, 1.0], [np.nan, 3.0]])
    interval = mean_intervals(values, resamples=500)
    assert interval.estimate == pytest.approx([1.0, 2.0])
    assert (interval.low[0], interval.high[0]) == (1.0, 1.0)
    assert np.isnan(mean_intervals(np.full((3, 1), np.nan), resamples=200).estimate[0])


def test_a_ratio_is_of_sums_and_its_draws_are_paired() -> None:
    above, below = np.array([[1.0], [3.0]]), np.array([[2.0], [6.0]])
    interval = ratio_intervals(above, below, resamples=500)
    assert (interval.estimate[0], interval.low[0], interval.high[0]) == pytest.approx((0.5, 0.5, 0.5))


def test_intervals_of_a_mean_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    interval = mean_intervals(rng.normal(2.0, 1.0, (40, 400)), resamples=1000)
    assert 0.90 <= np.mean((interval.low <= 2.0) & (interval.high >= 2.0)) <= 0.98


def test_rank_correlations_are_those_of_scipy_ties_included() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.integers(0, 5, (6, 9)), rng.integers(0, 5, (6, 9))
    assert spearman(x, y) == pytest.approx([spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])
    assert np.isnan(spearman(np.ones(4), np.arange(4)))


def test_policies_are_ranked_by_their_means_and_cells_are_averaged() -> None:
    up = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    found = mean_spearman([(up, up), (up, -up)], [0, 0], resamples=200)
    assert (float(found.estimate), float(found.low), float(found.high)) == pytest.approx((0.0, 0.0, 0.0))
    # With two units the means of a resample are those of one of three weightings, of known probability.
    metric, outcome = np.array([[0.0, 3.0], [1.0, 1.0], [2.0, 0.0]]), np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    possible = [float(spearman(metric @ w, outcome @ w)) for w in np.array([[1, 0], [0.5, 0.5], [0.5, 0.5], [0, 1]])]
    one = mean_spearman([(metric, outcome)], [0], resamples=20_000)
    assert float(one.estimate) == possible[1]
    assert float(one.low) == pytest.approx(max(-1, possible[1] - 1.96 * np.std(possible)), abs=0.05)
    assert float(one.high) == pytest.approx(min(1, possible[1] + 1.96 * np.std(possible)), abs=0.05)


def test_the_interval_holds_the_estimate_though_draws_lie_below_it() -> None:
    rng = np.random.default_rng(5)
    rank = np.arange(20.0)[:, None]
    cells = [(rank + rng.normal(0, 9, (20, 12)), rank + rng.normal(0, 9, (20, 12))) for _ in range(6)]
    found = mean_spearman(cells, range(6), resamples=500)
    assert found.low < found.estimate < found.high <= 1


def test_a_constant_side_is_left_out_and_not_counted_as_zero() -> None:
    up, flat = np.array([[1.0], [2.0], [3.0]]), np.ones((3, 1))
    assert float(mean_spearman([(up, up), (up, flat)], [0, 1], resamples=100).estimate) == pytest.approx(1.0)
