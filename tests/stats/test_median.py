"""The interval of a median holds it as often as it says, whatever the distribution."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_probe.stats.median import MedianInterval, median_interval


def test_the_ends_are_values_and_the_confidence_is_the_binomials() -> None:
    assert median_interval([3, 1, 2, 6, 5, 4]) == MedianInterval(1, 6, 1 - 2 / 64)
    assert median_interval(range(1, 9)) == MedianInterval(2, 7, 1 - 2 * 9 / 256)
    assert median_interval([1.0] * 5) is None


@pytest.mark.parametrize("n", [6, 8, 13])
def test_it_holds_the_median_as_often_as_it_says(n: int) -> None:
    draws = 4000
    samples = np.random.default_rng(n).lognormal(0, 1.5, (draws, n))  # median 1, a long tail to one side
    found = [median_interval(s) for s in samples]
    held = np.mean([i is not None and i.low <= 1 <= i.high for i in found])
    said = found[0].confidence if found[0] else 0
    assert said >= 0.9
    assert held == pytest.approx(said, abs=4 * (said * (1 - said) / draws) ** 0.5)
