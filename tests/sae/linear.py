"""A causal model without any nonlinearity, with planted features: every attribution can be worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sglang_probe.sae.attribution import ERROR, Node, Prompt, Site
from sglang_probe.sae.sae import SAE

D, T, V, M = 12, 5, 7, 8


class Mix(nn.Module):
    """Adds what earlier positions hold, through one matrix."""

    def __init__(self, mix_TT: Tensor, through_DD: Tensor) -> None:
        super().__init__()
        self.mix, self.through = mix_TT, through_DD

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.einsum("ts,bsd,de->bte", self.mix, x, self.through)


class Linear(nn.Module):
    """Two layers; ids are positions of a table of rows."""

    def __init__(self, rows_TD: Tensor, mix: Tensor, through: Tensor, unembed_DV: Tensor) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(*rows_TD.shape, _weight=rows_TD)
        self.model.layers = nn.ModuleList([nn.Identity(), Mix(mix, through)])
        self.unembed = unembed_DV

    def forward(self, ids: Tensor, **_: Any) -> Any:
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        return SimpleNamespace(logits=x[:, -1:] @ self.unembed)


@dataclass
class Toy:
    prompt: Prompt
    effects: Tensor
    """Of each feature of layer 0 on the metric, `[T, M]`."""
    error_effects: Tensor
    causes: list[tuple[int, int]]
    """Position and latent of the two planted causes, the stronger first."""
    through: Tensor
    mix: Tensor
    weights: Tensor

    def sent(self, early: Node, late: Node) -> float:
        """What a node of layer 0 gives to a node of layer 1, by hand."""
        site0, site1 = (self.prompt.sites[i] for i in (0, 1))
        z, e = site0.split(self.prompt.rows[0])
        own = (
            e[early.position]
            if early.kind == ERROR
            else z[early.position, early.latent] * site0.sae.W_dec[early.latent]
        )
        moved = own * (early.position == late.position) + self.mix[late.position, early.position] * own @ self.through
        if late.kind == ERROR:
            # The SAE takes its part out of it, through the latents that are active there.
            active = site1.split(self.prompt.rows[1])[0][late.position] > 0
            moved = moved - (moved @ site1.sae.W_enc * active) @ site1.sae.W_dec
        else:
            moved = (moved @ site1.sae.W_enc[:, late.latent]) * site1.sae.W_dec[late.latent]
        return float(moved @ self.weights) * (late.position == T - 1)


def planted() -> Toy:
    """Eight orthonormal features in twelve dimensions. Feature 2 at position 1, and 5 at position 3, are moved by the
    second layer into the readout of the last position; what the SAE does not know adds a little."""
    rng = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(D, D, generator=rng))[0]
    features, rest = basis[:M], basis[M:]
    codes = torch.rand(T, M, generator=rng) + 0.5
    codes *= torch.rand(T, M, generator=rng) < 0.4
    codes[1, 2], codes[3, 5] = 2.0, 1.2
    noise = 0.3 * torch.randn(T, D - M, generator=rng)
    rows = codes @ features + noise @ rest
    mix = torch.zeros(T, T)
    mix[T - 1, :] = torch.tensor([0.0, 1.0, 0.0, 0.8, 0.0])
    # The second layer moves features 2 and 5 into dimension 6's direction, and one direction of the rest there too.
    through = (
        torch.outer(features[2], features[6])
        + torch.outer(features[5], features[6])
        + torch.outer(rest[0], features[6])
    )
    through = through + 0.2 * torch.outer(rest[1], rest[0])
    unembed = torch.zeros(D, V)
    unembed[:, 1] = features[6] + rest[0]
    unembed[:, 2] = -0.5 * features[6]
    sae = SAE("standard", features.T.contiguous(), features.contiguous(), torch.zeros(M), torch.zeros(D))
    weights = torch.zeros(V)
    weights[1], weights[2] = 1.0, -1.0
    model = Linear(rows, mix, through, unembed)
    traced = {i: torch.ones(T, dtype=torch.bool) for i in (0, 1)}
    prompt = Prompt(model, range(T), weights, [Site.of(0, sae), Site.of(1, sae)], traced)
    read = unembed @ weights
    arrives = torch.stack([mix[T - 1, t] * through @ read + (read if t == T - 1 else 0) for t in range(T)])
    z, e = prompt.sites[0].split(prompt.rows[0])
    return Toy(
        prompt,
        z * (arrives @ features.T),
        (e * arrives).sum(-1),
        [(1, 2), (3, 5)],
        through,
        mix,
        read,
    )
