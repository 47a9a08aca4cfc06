"""The interval of an area under the ROC curve covers what it claims to, and the curve is that of the area."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from sglang_probe.stats.auc import auc, auc_interval, roc


@pytest.mark.parametrize(("n", "m", "shift"), [(8, 30, 0.0), (25, 25, 0.0), (12, 12, 1.0), (40, 15, 2.0)])
def test_the_interval_covers(n: int, m: int, shift: float) -> None:
    """At least 93 % of 2,000 draws, for a nominal 95 %: two standard errors of such a count are 1 %."""
    rng = np.random.default_rng(n + m)
    truth = float(norm.cdf(shift / 2**0.5))
    held = 0
    for _ in range(2000):
        found = auc_interval(rng.normal(shift, size=n), rng.normal(size=m))
        held += float(found.low) <= truth <= float(found.high)
    assert held / 2000 > 0.93


def test_perfect_order_has_the_interval_of_so_many_pairs() -> None:
    found = auc_interval(np.arange(10, 20), np.arange(7))
    assert (float(found.estimate), float(found.high)) == (1.0, 1.0)
    assert float(found.low) == pytest.approx(0.025 ** (1 / 7))
    turned = auc_interval(np.arange(7), np.arange(10, 20))
    assert (float(turned.low), float(turned.high)) == (0.0, pytest.approx(1 - 0.025 ** (1 / 7)))


def test_five_of_a_kind_have_no_interval() -> None:
    found = auc_interval(np.arange(5.0), np.arange(100.0))
    assert np.isnan(found.low)
    assert float(found.estimate) == auc(np.arange(5.0), np.arange(100.0))


def test_the_area_under_the_curve_is_the_area() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, size=30).round(1), rng.normal(size=40).round(1)  # with ties
    curve = roc(a, b)
    x, y = (np.concatenate([[0], curve[:, i], [1]]) for i in (1, 2))
    assert np.trapezoid(y, x) == pytest.approx(auc(a, b))
    at = curve[5]
    assert at[1] == (b > at[0]).mean()
    assert at[2] == (a > at[0]).mean()
