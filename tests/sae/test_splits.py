"""Splits and merges: a planted one is found, and a dictionary in another order has none."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_probe.errors import ConfigError
from sglang_probe.sae.splits import against, splits
from tests.sae.planted import Array

FEATURES, WIDTH, N = 12, 40, 3000
RNG = np.random.default_rng(0)
BASIS = np.linalg.qr(RNG.normal(size=(WIDTH, WIDTH)))[0]
FIRES = RNG.random((N, FEATURES)) < 0.1
WHICH = RNG.random(N) < 0.5
FIRST = BASIS[:FEATURES]


def halved(latent: int = 4, *, alone: bool = False) -> tuple[Array, Array]:
    """The dictionary with one latent as two that point its way, which fire in turns; `alone`: one always does."""
    aside = BASIS[FEATURES : FEATURES + 2]
    two = 0.8 * FIRST[latent] + 0.6 * aside
    decoder = np.vstack([np.delete(FIRST, latent, 0), two])
    one, other = FIRES[:, latent] & (WHICH | alone), FIRES[:, latent] & ~WHICH
    return decoder, np.column_stack([np.delete(FIRES, latent, 1), one, other])


def test_a_latent_that_became_two_is_found_from_either_side() -> None:
    decoder, fires = halved()
    found = splits(FIRST, decoder, FIRES, fires)
    assert found[found["split"]]["latent"].tolist() == [4]
    row = found.set_index("latent").loc[4]
    assert (row["neighbours"], row["together"]) == (2, 1.0)
    assert row["alone"] == pytest.approx(0.5, abs=0.1)
    table = against((FIRST, FIRES), {"halved": (decoder, fires)}).iloc[0]
    assert (table["splits"], table["merges"]) == (1, 0)
    table = against((decoder, fires), {"whole": (FIRST, FIRES)}).iloc[0]
    assert (table["splits"], table["merges"]) == (0, 1)


def test_a_latent_that_one_other_covers_alone_is_not_split() -> None:
    decoder, fires = halved(alone=True)
    assert not splits(FIRST, decoder, FIRES, fires)["split"].any()


def test_two_that_do_not_cover_it_are_no_split() -> None:
    decoder, fires = halved()
    fires[:, -1] = False
    assert not splits(FIRST, decoder, FIRES, fires)["split"].any()


def test_the_same_latents_in_another_order_are_neither_split_nor_merged() -> None:
    order = np.random.default_rng(1).permutation(FEATURES)
    table = against((FIRST, FIRES), {"shuffled": (FIRST[order], FIRES[:, order])}).iloc[0]
    assert (table["splits"], table["merges"], table["latents"]) == (0, 0, FEATURES)


def test_rare_latents_are_not_counted_and_shapes_must_fit() -> None:
    rare = FIRES.copy()
    rare[:, 0] = np.arange(N) < 5
    assert 0 not in splits(FIRST, FIRST, rare, FIRES)["latent"].tolist()
    with pytest.raises(ConfigError, match="same rows"):
        splits(FIRST, FIRST, FIRES[:-1], FIRES)
