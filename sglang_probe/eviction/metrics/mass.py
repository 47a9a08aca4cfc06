"""Attention mass that a kept set holds.

`a` is `Layer.future_attention`, `[..., G, R, T, L + T]`; `keep` is `Selection.keep_TGL`, bool `[..., T or 1, G, L]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_probe.eviction.metrics.ratio import Ratio
from sglang_probe.eviction.metrics.trivial import candidate_share


def prompt_mass_recall(a: Tensor, keep: Tensor) -> Ratio:
    """Mass on kept prompt positions over mass on all prompt positions, `[..., G, R, T]`."""
    prompt = a[..., : keep.shape[-1]]
    return Ratio(held(prompt, keep), prompt.sum(-1))


def total_mass_recall(a: Tensor, keep: Tensor) -> Ratio:
    """Mass on kept prompt positions and on generated ones over all mass: 1 minus what the eviction takes away."""
    length = keep.shape[-1]
    return Ratio(held(a[..., :length], keep) + a[..., length:].sum(-1), a.sum(-1))


def nontrivial_mass_recall(a: Tensor, keep: Tensor, trivial_L: Tensor) -> Ratio:
    """As `prompt_mass_recall` over the candidates alone: trivial positions count neither above nor below the line.

    One sink with mass 0.5 lifts the prompt recall of every policy that keeps it to 0.5; here it has no part.
    """
    prompt = a[..., : keep.shape[-1]].masked_fill(trivial_L, 0.0)
    return Ratio(held(prompt, keep), prompt.sum(-1))


def nontrivial_mass_chance(a: Tensor, keep: Tensor, trivial_L: Tensor) -> Ratio:
    """Expected `nontrivial_mass_recall` of random candidates, as many per head as `keep` holds. Exact."""
    denominator = a[..., : keep.shape[-1]].masked_fill(trivial_L, 0.0).sum(-1)
    return Ratio(denominator * _by_head(candidate_share(keep, trivial_L)), denominator)


def protected_random_mass(a: Tensor, trivial_L: Tensor, candidates: int) -> Ratio:
    """Expected `prompt_mass_recall` of protected random: F and `candidates` random others. Exact, no sampling."""
    prompt = a[..., : len(trivial_L)]
    chosen = prompt.masked_fill(trivial_L, 0.0).sum(-1)
    share = candidates / int((~trivial_L).sum())
    return Ratio(prompt.masked_fill(~trivial_L, 0.0).sum(-1) + share * chosen, prompt.sum(-1))


def held(a_GRTL: Tensor, keep_TGL: Tensor) -> Tensor:
    """Weight on kept positions, `[..., G, R, T]`."""
    if keep_TGL.shape[-3] == 1:
        # One set for all steps is a matrix product, which does not write the masked weights out.
        keep_GL1 = keep_TGL.squeeze(-3).unsqueeze(-1).to(a_GRTL.dtype)
        flat = a_GRTL.flatten(-3, -2) @ keep_GL1
        return torch.unflatten(flat.squeeze(-1), -1, a_GRTL.shape[-3:-1])
    return (a_GRTL * keep_TGL.movedim(-3, -2).unsqueeze(-3)).sum(-1)


def _by_head(x_TG: Tensor) -> Tensor:
    """`[..., T, G]` beside `[..., G, R, T]`."""
    return x_TG.movedim(-1, -2).unsqueeze(-2)
