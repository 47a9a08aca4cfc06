"""The recalibrated threshold gives the number of active latents that it was asked for, whatever training left."""

from __future__ import annotations

import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.sae.sae import SAE
from sglang_probe.sae.threshold import recalibrated, shared_threshold, threshold_for
from tests.sae.small import hand_made, random_sae, rows


def shared(latents: int = 40, seed: int = 0) -> SAE:
    return random_sae("jumprelu", latents=latents, seed=seed, threshold=torch.zeros(latents))


@pytest.mark.parametrize("l0", [0.5, 3, 7.25])
def test_the_mean_number_of_active_latents_is_what_was_asked(l0: float) -> None:
    x = rows(3000)  # several blocks
    sae = recalibrated(shared(), x, l0)
    assert float((sae.encode(x) > 0).sum(1).float().mean()) == pytest.approx(l0, abs=1 / 3000)


def test_it_holds_on_rows_it_has_not_seen() -> None:
    sae = recalibrated(shared(), rows(4000), 5)
    assert float((sae.encode(rows(4000, seed=9)) > 0).sum(1).float().mean()) == pytest.approx(5, rel=0.03)


def test_what_fires_is_what_batch_topk_would_choose() -> None:
    x = rows(200)
    sae = shared()
    fires = recalibrated(sae, x, 4).encode(x) > 0
    pre = sae.pre_activations(x).flatten()
    chosen = torch.zeros_like(pre, dtype=torch.bool)
    chosen[pre.topk(200 * 4).indices] = True
    assert torch.equal(fires, chosen.view(200, -1))


def test_it_is_never_negative() -> None:
    x = torch.tensor([[3.0, 1.0], [2.0, -4.0]])  # four positive pre-activations of six
    assert threshold_for(hand_made("jumprelu", threshold=torch.zeros(3)), x, 2.5) == 0


def test_thresholds_that_were_learnt_are_not_replaced() -> None:
    with pytest.raises(ConfigError, match="learnt"):
        shared_threshold(random_sae("jumprelu"))
    with pytest.raises(ConfigError, match="no threshold"):
        recalibrated(random_sae("standard"), rows(), 2)


@pytest.mark.parametrize(("n", "l0"), [(0, 3), (10, 0), (10, 40)])
def test_what_cannot_be_found_is_refused(n: int, l0: float) -> None:
    with pytest.raises(ConfigError, match="cannot be found"):
        threshold_for(shared(), rows(n), l0)
