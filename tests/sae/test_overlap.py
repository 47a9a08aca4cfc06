"""Statistics of two regimes: planted changes of rates are found, and nothing is where nothing was planted."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_probe.errors import ConfigError
from sglang_probe.sae.codes import same_token_jaccard
from sglang_probe.sae.overlap import commonest_overlap, overlap, rank_correlation, rate_drift
from tests.sae.planted import Array, Planted

PLANTED = Planted.make(features=200, width=8, active=8)
TEXTS, EACH = 24, 120
ROWS = (np.full(TEXTS, EACH), np.full(TEXTS, EACH))


def regime(seed: int, change: dict[int, float] | None = None, text_seed: int = 0) -> Array:
    """Rows in which each feature fires, by text; a text has rates of its own, the same in both regimes."""
    factor = np.exp(0.3 * np.random.default_rng(text_seed).normal(size=(TEXTS, len(PLANTED.rates))))
    factor[:, list(change or {})] *= list((change or {}).values())
    rng = np.random.default_rng(seed)
    return rng.binomial(EACH, np.minimum(factor * PLANTED.rates, 1))


CHANGED = {i: 2.5 if i % 2 else 0.4 for i in range(20)}


def test_changed_rates_are_found_with_few_others() -> None:
    found = rate_drift(regime(1), regime(2, CHANGED), ROWS)
    discovered = set(found[found["q"] <= 0.05]["latent"])
    assert len(discovered & set(CHANGED)) >= 18
    assert len(discovered - set(CHANGED)) <= max(2, 0.15 * len(discovered))
    row = found.set_index("latent").loc[5]
    assert row["log2"] == pytest.approx(np.log2(2.5), abs=0.3)


def test_without_a_change_nothing_is_discovered() -> None:
    runs = [rate_drift(regime(2 * i), regime(2 * i + 1), ROWS) for i in range(40)]
    assert sum(bool((f["q"] <= 0.05).any()) for f in runs) <= 6  # 5 % of 40, and three standard deviations
    p = np.concatenate([f["p"] for f in runs])
    assert 0.04 < (p <= 0.05).mean() < 0.06


def test_rare_latents_are_not_tested() -> None:
    few = np.zeros((TEXTS, 3), int)
    few[0, 0], few[:, 1] = 1, 50
    assert rate_drift(few, few, ROWS)["latent"].tolist() == [1]


def test_overlap_stands_beside_what_no_difference_gives() -> None:
    # A set of the fifty commonest does not see what changes among those that stay in it.
    border = {i: 2.5 if i % 2 else 0.4 for i in range(40, 60)}
    same = overlap(regime(1), regime(2), n=50, draws=100)
    other = overlap(regime(1), regime(2, border), n=50, draws=100)
    assert other["jaccard_p"] < 0.02
    assert other["jaccard"] < other["jaccard_swapped_low"]
    assert other["jaccard_across"] < other["jaccard_halves"] - 0.02
    # The trap: without any difference it is far below 1 all the same.
    assert same["jaccard"] < 0.95
    assert same["jaccard"] >= same["jaccard_swapped_low"] - 0.05
    assert same["jaccard_across"] == pytest.approx(same["jaccard_halves"], abs=0.03)


def test_the_level_of_the_exchange_within_texts() -> None:
    p = [overlap(regime(2 * i), regime(2 * i + 1), n=50, draws=39)["rank_p"] for i in range(40)]
    assert (np.array(p) <= 0.05).sum() <= 6  # 5 % of 40, and three standard deviations


def test_jaccard_of_the_same_tokens_by_hand() -> None:
    a = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0]], bool)
    b = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 0]], bool)
    assert same_token_jaccard(a, b).tolist() == [1 / 3, 1, 1]


def test_overlap_and_rank_by_hand() -> None:
    a, b = np.array([5.0, 4, 3, 0, 0]), np.array([5.0, 3, 4, 1, 0])
    assert commonest_overlap(a, b, 2) == 1 / 3
    assert rank_correlation(a, b) == pytest.approx(0.8)
    assert np.isnan(rank_correlation(a[3:], b[3:]))


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ConfigError, match="six texts"):
        overlap(regime(1)[:5], regime(2)[:5])
    with pytest.raises(ConfigError, match="six texts"):
        rate_drift(regime(1)[:5], regime(2)[:5], (ROWS[0][:5], ROWS[1][:5]))
