"""Effective directions: a planted turn is found, another rate is not taken for one, and nothing stays nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.sae.codes import Codes, codes
from sglang_probe.sae.rotation import LEAST_FIRINGS, rotation
from sglang_probe.sae.sae import SAE

FEATURES, WIDTH, TEXTS, EACH = 16, 48, 20, 60
DIRECTIONS = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0][: FEATURES + 1]
KNOWN = torch.from_numpy(DIRECTIONS[:FEATURES].astype(np.float32))
SAE_OF_IT = SAE("jumprelu", KNOWN.T, KNOWN, torch.zeros(FEATURES), torch.zeros(WIDTH), threshold=torch.full((16,), 0.5))
TURNED = 3


def regime(seed: int, degrees: float = 0, rate: float = 0.1, noise: float = 0.3) -> Codes:
    """Rows in which feature 3 points elsewhere by so many degrees and fires at this rate; each text has a mean."""
    rng, angle = np.random.default_rng(seed), np.deg2rad(degrees)
    d = DIRECTIONS[:FEATURES].copy()
    d[TURNED] = np.cos(angle) * d[TURNED] + np.sin(angle) * DIRECTIONS[FEATURES]
    n = TEXTS * EACH
    fires = rng.random((n, FEATURES)) < np.where(np.arange(FEATURES) == TURNED, rate, 0.1)
    text = np.repeat(np.arange(TEXTS), EACH)
    means = 0.1 * np.random.default_rng(9).normal(size=(TEXTS, WIDTH))
    x = (fires * rng.uniform(1, 2, fires.shape)) @ d + means[text] + noise * rng.normal(size=(n, WIDTH)) / WIDTH**0.5
    return codes(SAE_OF_IT, [torch.from_numpy(x.astype(np.float32))], text)


def test_a_turn_of_thirty_degrees_is_found_and_is_not_smeared_over_the_others() -> None:
    found = rotation(regime(1), regime(2, degrees=30), DIRECTIONS[:FEATURES], draws=499).latents.set_index("latent")
    discovered = found[found["q"] <= 0.05].index.tolist()
    assert TURNED in discovered
    assert len(discovered) <= 2  # 5 % of discoveries may be false; without the text's mean taken off it is all 16
    assert found.loc[TURNED, "cosine"] == pytest.approx(np.cos(np.deg2rad(30)), abs=0.03)
    assert found.loc[TURNED, "cosine"] < found.loc[TURNED, "exchanged_low"]


def test_without_a_turn_p_values_are_uniform_although_cosines_are_below_one() -> None:
    runs = [
        rotation(regime(2 * i, noise=1.5), regime(2 * i + 1, noise=1.5), KNOWN.numpy(), draws=99, splits=4)
        for i in range(12)
    ]
    p = np.concatenate([r.latents["p"] for r in runs])
    assert 0.01 < (p <= 0.05).mean() < 0.11  # 5 % of 192, and three standard deviations
    assert 0.4 < p.mean() < 0.6
    assert max(r.summary["value"].iloc[1] for r in runs) < 0.998
    told = runs[0].summary.iloc[0]
    assert told["halves"] == pytest.approx(told["across"], abs=0.01)


def test_a_latent_that_fires_less_has_not_turned() -> None:
    p = [
        rotation(regime(2 * i), regime(2 * i + 1, rate=0.03), DIRECTIONS[:FEATURES], draws=99, splits=2)
        .latents.set_index("latent")
        .loc[TURNED, "p"]
        for i in range(40)
    ]
    assert sum(x <= 0.05 for x in p) <= 6  # 5 % of 40, and three standard deviations


def test_as_many_firings_are_taken_of_each_text_in_either_regime() -> None:
    a, b = regime(1), regime(2, rate=0.08)
    found = rotation(a, b, DIRECTIONS[:FEATURES], draws=9, splits=2).latents.set_index("latent")
    taken = np.minimum(a.fired_TM, b.fired_TM).sum(0)
    assert found["firings"].tolist() == taken[found.index].tolist()
    assert taken[TURNED] < b.fired_TM[:, TURNED].sum()
    assert set(found.index) == set(np.flatnonzero(taken >= LEAST_FIRINGS))


def test_codes_are_what_the_sae_says() -> None:
    x = torch.randn((70, WIDTH), generator=torch.Generator().manual_seed(0))
    found = codes(SAE_OF_IT, x.split(30), np.arange(70) % 7)
    z, made = SAE_OF_IT.encode_and_reconstruct(x)
    assert np.array_equal(found.z_NM.toarray(), z.numpy())
    np.testing.assert_allclose(found.rest_ND, (x - made).numpy(), atol=1e-6)
    assert found.fired_TM[2].tolist() == (z[2::7] > 0).sum(0).tolist()
    assert found.active.tolist() == (z > 0).sum(1).tolist()
    with pytest.raises(ConfigError, match="cannot be encoded"):
        codes(SAE_OF_IT, [x], np.zeros(3))


def test_regimes_of_few_or_other_texts_are_refused() -> None:
    a = regime(1)
    few = Codes(a.z_NM[:300], a.rest_ND[:300], a.text_N[:300], 5)
    with pytest.raises(ConfigError, match="at least six"):
        rotation(few, few, DIRECTIONS[:FEATURES])
    with pytest.raises(ConfigError, match="same texts"):
        rotation(a, few, DIRECTIONS[:FEATURES])
