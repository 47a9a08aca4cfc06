"""Small statistics, against values that can be counted by hand or derived."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sglang_probe.stats.auc import auc, auc_without
from sglang_probe.stats.equivalence import within
from sglang_probe.stats.multiple import benjamini_hochberg, holm, sign_flip_max


def test_adjusted_p_values_are_those_of_the_step_up_rule() -> None:
    assert benjamini_hochberg(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    with_gap = benjamini_hochberg(np.array([[0.01, np.nan], [0.04, np.nan]]))
    assert with_gap[:, 0] == pytest.approx([0.02, 0.04])
    assert np.isnan(with_gap[:, 1]).all()


def test_holm_is_the_step_down_rule() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with_gap = holm(np.array([0.5, np.nan, 0.9]))
    assert with_gap[[0, 2]] == pytest.approx([1.0, 1.0])
    assert np.isnan(with_gap[1])


def test_the_area_without_each_text_or_family_is_the_area_of_the_others() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, (7, 5)) * 1.0, rng.integers(0, 8, (7, 5)) * 1.0  # ties among them
    others = [auc(np.delete(a, i, 0).ravel(), np.delete(b, i, 0).ravel()) for i in range(7)]
    assert auc_without(a, b, np.arange(7)) == pytest.approx(others)
    group = np.array([0, 1, 1, 0, 2, 2, 2])
    rest = [auc(a[group != g].ravel(), b[group != g].ravel()) for g in range(3)]
    assert auc_without(a, b, group) == pytest.approx(rest)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(-0.1, 0.1, "equivalent"), (0.3, 0.5, "different"), (-0.5, -0.2, "different"), (0.1, 0.3, "unresolved")],
)
def test_an_interval_against_a_margin(low: float, high: float, said: str) -> None:
    assert within(low, high, 0.2) == said
    assert within(float("nan"), float("nan"), 0.2) == "unresolved"


def test_columns_that_say_the_same_are_not_paid_for_twice() -> None:
    positive = np.arange(1.0, 7.0)[:, None]
    assert sign_flip_max(positive) == pytest.approx([1 / 64])
    assert sign_flip_max(np.repeat(positive, 12, axis=1)) == pytest.approx([1 / 64] * 12)
    with_gap = np.concatenate([positive, -positive, np.zeros_like(positive)], axis=1)
    assert sign_flip_max(with_gap)[1:] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("units", "columns"), [(8, 12), (40, 12)])
def test_columns_about_zero_are_rejected_at_the_level_and_a_shifted_one_is_found(units: int, columns: int) -> None:
    any_false, found = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        noise = rng.standard_normal((units, columns)) + rng.standard_normal((units, 1))
        any_false.append(sign_flip_max(noise, draws=1000).min() <= 0.05)
        noise[:, 3] = 2.0 + 0.5 * rng.standard_normal(units)
        found.append(sign_flip_max(noise, draws=1000)[3] <= 0.05)
    assert 0.01 <= np.mean(any_false) <= 0.09  # three standard errors about 0.05
    assert np.mean(found) > 0.95


def test_the_level_is_of_symmetric_units_and_not_of_a_mean_of_zero() -> None:
    def rejected(draw: Callable[[np.random.Generator], np.ndarray]) -> float:
        rng = np.random.default_rng(0)
        return float(np.mean([sign_flip_max(draw(rng)).min() <= 0.025 for _ in range(400)]))

    assert rejected(lambda rng: rng.standard_normal((10, 12))) <= 0.05  # three standard errors above 0.025
    assert rejected(lambda rng: 1 - rng.exponential(size=(10, 12))) > 0.15  # a mean of zero, and most are above
    assert rejected(lambda rng: -np.abs(rng.standard_normal((10, 12)))) == 0.0  # lower
