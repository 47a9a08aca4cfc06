"""Rank correlations over policies, and their interval over policies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from sglang_probe.stats.agreement import mean_spearman, spearman, without_each
from sglang_probe.stats.intervals import crossed_interval, jackknife_interval


def test_rank_correlations_are_those_of_scipy_ties_included() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.integers(0, 5, (6, 9)), rng.integers(0, 5, (6, 9))
    assert spearman(x, y) == pytest.approx([spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)])
    assert np.isnan(spearman(np.ones(4), np.arange(4)))


def test_cells_are_averaged_and_each_policy_is_left_out_in_turn() -> None:
    rng = np.random.default_rng(5)
    cells = [(rng.normal(size=7), rng.normal(size=7)) for _ in range(3)]
    whole, without = mean_spearman([without_each(x, y) for x, y in cells])
    assert whole == pytest.approx(np.mean([spearmanr(x, y).statistic for x, y in cells]))
    for p in range(7):
        rest = [spearmanr(np.delete(x, p), np.delete(y, p)).statistic for x, y in cells]
        assert without[p] == pytest.approx(np.mean(rest))


def test_a_policy_that_a_cell_has_not_takes_no_part_in_it() -> None:
    x, y = np.array([1.0, 2, 3, np.nan]), np.array([2.0, 1, 3, 9])
    assert without_each(x, y)[0] == pytest.approx(spearmanr(x[:3], y[:3]).statistic)


def test_a_constant_side_is_left_out_and_not_counted_as_zero() -> None:
    up, flat = np.array([1.0, 2, 3]), np.ones(3)
    assert mean_spearman([without_each(up, up), without_each(up, flat)])[0] == pytest.approx(1.0)
    assert np.isnan(mean_spearman([without_each(up, flat)])[0])


def test_the_interval_over_policies_covers_the_correlation_of_endless_policies() -> None:
    """21 policies in six cells; the correlation of 200,000 is the truth."""
    rng = np.random.default_rng(6)

    def drawn(policies: int, cells: int) -> list[tuple[np.ndarray, np.ndarray]]:
        good = rng.normal(size=policies)
        own = 0.7 * rng.normal(size=policies)
        return [
            (good + own + 0.3 * rng.normal(size=policies), good + 0.3 * rng.normal(size=policies)) for _ in range(cells)
        ]

    truth = float(spearman(*drawn(200_000, 1)[0]))
    covered = 0
    for _ in range(400):
        whole, without = mean_spearman([without_each(x, y) for x, y in drawn(21, 6)])
        found = jackknife_interval(np.asarray(whole), without, bounds=(-1.0, 1.0))
        covered += bool(found.low <= truth <= found.high)
    assert covered / 400 >= 0.915  # 0.95 less three standard errors


def test_the_interval_over_policies_and_prompts_holds_both() -> None:
    policies, prompts = np.linspace(0.4, 0.6, 9), np.linspace(0.45, 0.55, 12)
    one, other = (jackknife_interval(np.float64(0.5), w) for w in (policies, prompts))
    low, high = crossed_interval(0.5, policies, prompts)
    assert high - 0.5 == pytest.approx(np.hypot(one.high - 0.5, other.high - 0.5))
    assert 0.5 - low == pytest.approx(np.hypot(0.5 - one.low, 0.5 - other.low))
    # Prompts that change no rank add nothing; too few of them are no sample.
    assert crossed_interval(0.5, policies, np.full(12, 0.5)) == pytest.approx((float(one.low), float(one.high)))
    assert np.isnan(crossed_interval(0.5, policies, np.full(5, 0.5))).all()
    assert np.isnan(crossed_interval(0.5, np.full(9, 0.5), np.full(9, 0.5))).all()
    assert crossed_interval(0.9, np.linspace(0.5, 1, 9), prompts, bounds=(-1, 1))[1] == 1.0


@pytest.mark.parametrize("prompts", [8, 12])
def test_that_interval_covers_the_correlation_of_endless_policies_on_endless_prompts(prompts: int) -> None:
    """21 policies whose metric and outcome are means over prompts, which favour some policies."""
    rng = np.random.default_rng(prompts)

    def sides(policies: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        good, own = rng.normal(size=(2, 1, policies))
        noise = rng.normal(size=(2, n, policies))
        return good + 0.7 * own + noise[0], good + 1.5 * noise[1]

    good, own = rng.normal(size=(2, 200_000))
    truth = float(spearman(good + 0.7 * own, good))
    covered = 0
    for _ in range(300):
        x, y = sides(21, prompts)
        whole, policies = mean_spearman([without_each(x.mean(0), y.mean(0))])
        less = spearman(*((side.sum(0) - side) / (prompts - 1) for side in (x, y)))
        low, high = crossed_interval(whole, policies, less, bounds=(-1.0, 1.0))
        covered += low <= truth <= high
    assert covered / 300 >= 0.91  # 0.95 less three standard errors
