"""The reader's arithmetic, by hand: codes, reconstructions, single latents, and foldings that change neither."""

from __future__ import annotations

import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.sae.sae import SAE
from tests.sae.small import hand_made, random_sae, rows

X = torch.tensor([[3.0, 1.0], [2.0, -4.0]])
"""Without the bias of the decoder (2, 1) and (1, -4): pre-activations (2, 1.5, -3) and (1, -3.5, 3)."""

CODES = {
    "standard": [[2.0, 1.5, 0.0], [1.0, 0.0, 3.0]],
    "jumprelu": [[0.0, 1.5, 0.0], [0.0, 0.0, 3.0]],  # 2 is at its threshold, not above it
    "topk": [[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]],
}
MADE = {
    "standard": [[5.0, 4.5], [0.0, -3.0]],
    "jumprelu": [[1.0, 4.5], [-2.0, -3.0]],
    "topk": [[5.0, 0.0], [-2.0, -3.0]],
}


@pytest.mark.parametrize("architecture", CODES)
def test_codes_and_reconstructions_are_those_worked_out_by_hand(architecture: str) -> None:
    sae = hand_made(architecture)
    z, made = sae.encode_and_reconstruct(X)
    assert z.tolist() == CODES[architecture]
    assert made.tolist() == MADE[architecture]
    assert torch.equal(sae.encode(X), z)
    assert torch.equal(sae.decode(z), made)


def test_an_sae_that_does_not_take_the_bias_off_its_input() -> None:
    sae = hand_made(apply_b_dec_to_input=False)
    assert sae.encode(X).tolist() == [[3.0, 1.5, 0.0], [2.0, 0.0, 2.0]]


def test_topk_by_decoder_norm_chooses_what_adds_most() -> None:
    # Lengths that the latents add to the first row: 2 * 2 and 1.5 * 3.
    sae = hand_made("topk", rescale_by_decoder_norm=True)
    assert sae.encode(X)[0].tolist() == [0.0, 4.5, 0.0]
    assert sae.reconstruct(X)[0].tolist() == [1.0, 4.5]


def test_of_the_k_largest_only_positive_ones_are_active() -> None:
    sae = hand_made("topk", k=3)
    assert sae.encode(X).tolist() == CODES["standard"]


def test_layer_norm_is_done_and_undone() -> None:
    sae = hand_made(normalize="layer_norm", b_dec=torch.zeros(2), b_enc=torch.zeros(3))
    # Mean 2 and deviation sqrt(2): the normalised row is (1, -1) / sqrt(2).
    z, made = sae.encode_and_reconstruct(torch.tensor([[3.0, 1.0]]))
    assert z[0].tolist() == pytest.approx([0.5**0.5, 0, 0], abs=1e-5)
    assert made[0].tolist() == pytest.approx([2 + 2.0, 2.0], abs=1e-4)
    with pytest.raises(ConfigError, match="reconstruct"):
        sae.decode(z)


def test_rows_rescaled_to_one_norm_are_scaled_back() -> None:
    sae = hand_made(normalize="constant_norm_rescale", b_dec=torch.zeros(2), b_enc=torch.zeros(3))
    z, made = sae.encode_and_reconstruct(torch.tensor([[3.0, 4.0]]))  # norm 5, becomes sqrt(2)
    scale = 5 / 2**0.5
    assert z[0].tolist() == pytest.approx([3 / scale, 4 / scale, 0])
    assert made[0].tolist() == pytest.approx([6.0, 12.0])


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_a_latent_alone_is_what_it_is_among_all(architecture: str) -> None:
    sae = random_sae(architecture)
    x = rows()
    assert torch.allclose(sae.features(x, [7, 0]), sae.encode(x)[:, [7, 0]], atol=1e-6)


@pytest.mark.parametrize(
    ("sae", "why"),
    [(hand_made("topk"), "topk"), (hand_made(normalize="layer_norm"), "normalised")],
    ids=["topk", "layer norm"],
)
def test_a_latent_that_cannot_be_computed_alone_is_refused(sae: SAE, why: str) -> None:
    assert not sae.elementwise
    with pytest.raises(ConfigError, match=why):
        sae.features(X, [0])


@pytest.mark.parametrize("index", [3, -1])
def test_a_latent_that_is_not_there_is_refused(index: int) -> None:
    with pytest.raises(ConfigError, match=f"no latent {index}"):
        hand_made().features(X, [index])


@pytest.mark.parametrize("architecture", CODES)
def test_folding_the_decoder_norm_changes_no_reconstruction_and_no_choice(architecture: str) -> None:
    sae = random_sae(architecture)
    folded = sae.unit_norm()
    x = rows()
    assert torch.allclose(folded.W_dec.norm(dim=1), torch.ones(sae.latents))
    assert torch.allclose(folded.reconstruct(x), sae.reconstruct(x), atol=1e-4)
    assert torch.equal(folded.encode(x) > 0, sae.encode(x) > 0)


def test_folding_a_topk_that_chooses_by_unscaled_activations_is_refused() -> None:
    with pytest.raises(ConfigError, match="which latents"):
        random_sae("topk", rescale_by_decoder_norm=False).unit_norm()


@pytest.mark.parametrize("architecture", CODES)
def test_an_sae_of_scaled_rows_folded_to_rows_as_they_are(architecture: str) -> None:
    sae = random_sae(architecture)
    x, factor = rows(), 0.125
    folded = sae.scaled(factor)
    assert torch.allclose(folded.reconstruct(x), sae.reconstruct(factor * x) / factor, atol=1e-4)
    assert torch.equal(folded.encode(x) > 0, sae.encode(factor * x) > 0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"b_enc": torch.zeros(4)}, "`b_enc` is of shape"),
        ({"W_dec": torch.zeros(2, 3)}, "`W_dec` is of shape"),
        ({"W_enc": torch.full((2, 3), float("nan"))}, "not finite"),
        ({"normalize": "covariance_whitening"}, "covariance_whitening"),
    ],
)
def test_weights_that_do_not_fit_are_refused(changed: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        hand_made(**changed)


def test_an_architecture_without_what_it_needs_is_refused() -> None:
    with pytest.raises(ConfigError, match="`threshold` is missing"):
        hand_made("jumprelu", threshold=None)
    with pytest.raises(ConfigError, match="`k` 4"):
        hand_made("topk", k=4)
    with pytest.raises(ConfigError, match="gated"):
        hand_made("gated")


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="width 2"):
        hand_made().encode(torch.zeros(1, 3))
