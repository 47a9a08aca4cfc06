"""Small SAEs whose outputs can be worked out by hand, and random ones."""

from __future__ import annotations

from typing import Any

import torch

from sglang_probe.sae.sae import SAE


def hand_made(architecture: Any = "standard", **more: Any) -> SAE:
    """Two numbers a row, three latents: the first number, the second, and minus their sum; decoders are (2, 0), (0, 3),
    (-1, -1), and 1 is taken off the first number."""
    given: dict[str, Any] = {
        "W_enc": torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]]),
        "W_dec": torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, -1.0]]),
        "b_enc": torch.tensor([0.0, 0.5, 0.0]),
        "b_dec": torch.tensor([1.0, 0.0]),
    }
    if architecture == "jumprelu":
        given["threshold"] = torch.tensor([2.0, 0.0, 0.0])
    if architecture == "topk":
        given["k"] = 1
    return SAE(architecture, **{**given, **more})


def random_sae(architecture: Any, width: int = 6, latents: int = 11, seed: int = 0, **more: Any) -> SAE:
    """Weights without any structure; decoder norms differ from 1."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    given: dict[str, Any] = {
        "W_enc": normal(width, latents),
        "W_dec": normal(latents, width),
        "b_enc": normal(latents) / 2,
        "b_dec": normal(width),
    }
    if architecture == "jumprelu":
        given["threshold"] = normal(latents).abs() / 2
    if architecture == "topk":
        given |= {"k": 3, "rescale_by_decoder_norm": True}
    return SAE(architecture, **{**given, **more})


def rows(n: int = 50, width: int = 6, seed: int = 1) -> torch.Tensor:
    """Normal rows with a mean."""
    return torch.randn((n, width), generator=torch.Generator().manual_seed(seed)) * 2 + 1
