"""Rows of SAELens' own generator, whose features are known: what was planted in them is found, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sglang_probe.sae.codes import Codes, codes
from sglang_probe.sae.match import match
from sglang_probe.sae.overlap import overlap, rate_drift
from sglang_probe.sae.rotation import rotation
from sglang_probe.sae.sae import SAE
from sglang_probe.sae.splits import against
from tests.sae.lens import needs_sae_lens

pytestmark = [needs_sae_lens, pytest.mark.slow]
FEATURES, WIDTH, TEXTS, EACH = 60, 128, 24, 200
CHANGED = range(12)


@pytest.fixture(scope="module")
def dictionary() -> Any:
    from sae_lens.synthetic import FeatureDictionary

    torch.manual_seed(0)
    return FeatureDictionary(FEATURES, WIDTH, bias=False)


@pytest.fixture(scope="module")
def sae(dictionary: Any) -> SAE:
    known = dictionary.feature_vectors.detach()
    bar = torch.full((FEATURES,), 0.5)
    return SAE("jumprelu", known.T.contiguous(), known, torch.zeros(FEATURES), torch.zeros(WIDTH), threshold=bar)


def regime(dictionary: Any, sae: SAE, seed: int, change: float = 1) -> Codes:
    from sae_lens.synthetic import ActivationGenerator

    rates = 6 / torch.arange(3.0, FEATURES + 3) / (1 / torch.arange(3.0, FEATURES + 3)).sum()
    for i in CHANGED:
        rates[i] *= change if i % 2 else 1 / change
    rates = rates.clamp(max=0.9)
    torch.manual_seed(seed)
    made = ActivationGenerator(FEATURES, rates, std_firing_magnitudes=0.2, mean_firing_magnitudes=1.5)
    with torch.no_grad():
        x = dictionary(made.sample(TEXTS * EACH))
        x = x + 0.3 * torch.randn(x.shape) / WIDTH**0.5
    return codes(sae, x.split(1000), np.repeat(np.arange(TEXTS), EACH))


def test_our_matching_is_theirs(dictionary: Any) -> None:
    from sae_lens.synthetic.evals import mean_correlation_coefficient

    known = dictionary.feature_vectors.detach()
    other = torch.randn((40, WIDTH), generator=torch.Generator().manual_seed(1))
    assert match(known.double().numpy(), other.double().numpy()).mcc == pytest.approx(
        mean_correlation_coefficient(known, other), abs=1e-6
    )
    shuffled = known[torch.randperm(FEATURES, generator=torch.Generator().manual_seed(2))]
    assert match(known.double().numpy(), shuffled.double().numpy()).mcc == pytest.approx(1)


def test_changed_rates_are_found_and_no_direction_is_taken_for_turned(dictionary: Any, sae: SAE) -> None:
    a, b = regime(dictionary, sae, 1), regime(dictionary, sae, 2, change=3)
    drift = rate_drift(a.fired_TM, b.fired_TM, (a.rows_T, b.rows_T))
    found = set(drift[drift["q"] <= 0.05]["latent"])
    assert len(found & set(CHANGED)) >= 11
    assert len(found - set(CHANGED)) <= 2
    assert overlap(a.fired_TM, b.fired_TM, n=20)["rank_p"] < 0.02
    turned = rotation(a, b, sae.W_dec.double().numpy(), draws=499).latents
    assert (turned["q"] <= 0.05).sum() <= 2


def test_without_a_change_there_is_none(dictionary: Any, sae: SAE) -> None:
    a, b = regime(dictionary, sae, 3), regime(dictionary, sae, 4)
    drift = rate_drift(a.fired_TM, b.fired_TM, (a.rows_T, b.rows_T))
    assert (drift["q"] <= 0.05).sum() <= 1
    assert overlap(a.fired_TM, b.fired_TM, n=20)["rank_p"] > 0.01
    turned = rotation(a, b, sae.W_dec.double().numpy(), draws=199).latents
    assert (turned["q"] <= 0.05).sum() <= 1
    pair = (sae.W_dec.double().numpy(), a.z_NM)
    table = against(pair, {"itself": pair}).iloc[0]
    assert (table["splits"], table["merges"]) == (0, 0)
