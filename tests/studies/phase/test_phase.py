"""The phase study on made-up rows: what was planted is found, where it was planted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from sglang_probe.stats.auc import auc
from sglang_probe.studies.phase.moments import describe, reference_band
from sglang_probe.studies.phase.probe import probe

TEXTS, POSITIONS, WIDTH = 40, 50, 8


def rows(seed: int, shift: float = 0.0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(TEXTS, POSITIONS, WIDTH))
    x[..., 0] += shift
    return x


def test_auc_counts_pairs() -> None:
    assert auc(np.array([2.0, 3.0]), np.array([1.0, 2.0])) == 3.5 / 4
    assert auc(np.array([1.0]), np.array([1.0])) == 0.5
    assert np.isnan(auc(np.array([]), np.array([1.0])))


@pytest.mark.parametrize("shift", [0.3, 1.0])
def test_a_planted_direction_is_found_with_the_auc_that_theory_gives(shift: float) -> None:
    found = probe(rows(0, shift), rows(1))
    expected = norm.cdf(shift / np.sqrt(2))
    assert found.low < expected < found.high
    assert found.auc == pytest.approx(expected, abs=0.02)
    assert found.null_low < 0.5 < found.null_high < found.low
    assert found.p == 0.01


def test_nothing_is_found_where_nothing_was_planted() -> None:
    found = probe(rows(0), rows(1))
    assert found.auc == pytest.approx(0.5, abs=0.03)
    assert found.p > 0.05
    same = rows(2)
    assert probe(same, same.copy()).auc == 0.5


def test_the_null_is_that_of_rows_that_were_exchanged() -> None:
    """The first null, computed by exchanging the rows themselves and asking the probe anew."""
    a, b = rows(0, 0.2), rows(1)
    g = np.random.default_rng(0)
    g.permutation(TEXTS)
    nulls = []
    for _ in range(99):
        swap = (g.random(TEXTS) < 0.5)[:, None, None]
        if len(nulls) < 3:
            nulls.append(probe(np.where(swap, b, a), np.where(swap, a, b)).auc)
    found = probe(a, b)
    assert found.null_low - 0.02 <= min(nulls) <= max(nulls) <= found.null_high + 0.02


def test_where_nothing_was_planted_p_is_as_often_small_as_it_should() -> None:
    small = sum(probe(rows(i)[:20, :8], rows(1000 + i)[:20, :8]).p <= 0.1 for i in range(60))
    assert small / 60 <= 0.22  # 10 % and three standard errors


def test_a_text_that_is_on_both_sides_would_be_learned_by_heart() -> None:
    """Each text has a level of its own: a probe that saw the text would tell its two kinds apart, ours must not."""
    level = np.random.default_rng(3).normal(size=(TEXTS, 1, WIDTH)) * 5
    found = probe(rows(0) + level, rows(1) + level)
    assert found.auc == pytest.approx(0.5, abs=0.03)


def test_texts_of_one_family_count_as_one() -> None:
    """Eight families of five texts: how far the two kinds lie apart belongs to the family."""
    family = np.arange(8).repeat(5)
    apart = np.random.default_rng(3).normal(1, 0.7, (8, 1)).repeat(5, axis=0)
    a, b = rows(0), rows(1)
    a[..., 0] += apart
    together, alone = probe(a, b, family), probe(a, b)
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
    wide, narrow = (describe(a * (2 + apart[..., None]), reference_band(b), f) for f in (family, None))
    assert wide["norm_high"] - wide["norm_low"] > 1.5 * (narrow["norm_high"] - narrow["norm_low"])
    assert wide["norm"] == narrow["norm"]
    few = probe(a[:25], b[:25], family[:25])
    assert np.isnan([few.low, few.high]).all()


def test_moments_of_known_distributions() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(200, 100, 4))
    band = reference_band(reference)
    ordinary = describe(rng.normal(size=(200, 100, 4)), band)
    assert ordinary["outliers"] == pytest.approx(0.001, abs=3e-4)
    assert ordinary["variance"] == pytest.approx(1.0, abs=0.02)
    assert ordinary["kurtosis"] == pytest.approx(0.0, abs=0.1)
    assert ordinary["norm_low"] < ordinary["norm"] < ordinary["norm_high"]
    heavy = describe(rng.laplace(size=(200, 100, 4)) / np.sqrt(2), band)
    assert heavy["kurtosis"] == pytest.approx(3.0, abs=0.5)
    assert heavy["outliers"] > 5 * ordinary["outliers"]
    shifted = describe(rng.normal(size=(200, 100, 4)) + 2, band)
    assert shifted["mean"] == pytest.approx(2.0, abs=0.02)
