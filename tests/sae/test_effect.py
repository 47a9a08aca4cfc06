"""What replacing rows does: numbers by hand, and intervals that hold a planted truth."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_probe.sae.effect import difference, mean, ratio, recovered


def test_numbers_worked_out_by_hand() -> None:
    rows = np.array([2.0, 4, 2, 2, 2, 2])
    clean, spliced, nothing = rows * 3, rows * 3.5, rows * 8
    assert recovered(clean, spliced, nothing, rows).estimate == pytest.approx((8 - 3.5) / (8 - 3))
    assert ratio(spliced, clean).estimate == pytest.approx(3.5 / 3)
    assert mean(spliced, rows).estimate == pytest.approx(3.5)
    assert mean(np.append(spliced, 0), np.append(rows, 0)).estimate == pytest.approx(3.5)
    assert difference(clean, rows, nothing, rows).estimate == pytest.approx(5)
    # A text that one arm lacks takes no part in either.
    less = np.where(np.arange(6) == 1, 0, rows)
    assert difference(clean * np.arange(6), rows, nothing * (less > 0), less).estimate == pytest.approx(8 - 3 * 14 / 5)


def test_an_interval_ends_where_the_numbers_do() -> None:
    found = ratio(np.array([30.0, 0, 0, 0, 0, 0, 1]), np.ones(7))
    assert found.low == 0 < found.estimate


def test_nothing_lost_is_1_and_everything_lost_is_0() -> None:
    rows = np.full(8, 10.0)
    rng = np.random.default_rng(0)
    clean, nothing = rows * rng.uniform(2, 3, 8), rows * rng.uniform(7, 9, 8)
    assert recovered(clean, clean, nothing, rows).estimate == 1
    assert recovered(clean, nothing, nothing, rows).estimate == 0


@pytest.mark.parametrize("truth", [0.95, 1.0])
def test_the_interval_holds_a_planted_share_nineteen_times_in_twenty(truth: float) -> None:
    """Texts differ in every one of the three losses; 1.0: an SAE that loses nothing but adds noise."""
    rng, missed = np.random.default_rng(1), 0
    for _ in range(300):
        rows = rng.integers(50, 100, 20).astype(float)
        clean, nothing = rng.normal(3, 0.5, 20), rng.normal(8, 0.5, 20)
        spliced = clean + (1 - truth) * 5 + rng.normal(0, 0.1, 20)
        found = recovered(clean * rows, spliced * rows, nothing * rows, rows)
        missed += not found.low <= truth <= found.high
    assert missed <= 27  # 5 % of 300, and three standard deviations


def test_equal_errors_have_a_ratio_whose_interval_holds_1() -> None:
    rng, missed = np.random.default_rng(2), 0
    for _ in range(300):
        level = rng.uniform(0.5, 2, 20)
        found = ratio(level * rng.lognormal(0, 0.3, 20), level * rng.lognormal(0, 0.3, 20))
        missed += not found.low <= 1 <= found.high
    assert missed <= 27
    level = rng.uniform(0.5, 2, 30)
    worse = ratio(1.75 * level * rng.lognormal(0, 0.2, 30), level * rng.lognormal(0, 0.2, 30))
    assert 1.3 < worse.low < 1.75 < worse.high
