"""Attention telemetry of decode steps: a few numbers per step and head, from their attention weights.

Input everywhere: weights `a`, `[..., T, J]` (any head axes in front), over J = L + T keys, prompt first; decode step t
sits at position L + t and gives no weight to later keys. Source of the definitions: the field's usual ones, normalised
so that steps of different length compare.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_probe.errors import ProbeError
from sglang_probe.stats.distance import jensen_shannon, normalised


@dataclass(frozen=True)
class Entropy:
    """Entropy of attention per step, `[..., T]`."""

    normalised: Tensor
    """Entropy over the logarithm of the number of visible keys: 0 on one key, 1 when uniform."""
    support: Tensor
    """exp(entropy): the number of keys that would carry it if they were equal."""


def entropy(a: Tensor, length: int, *, sinks: int = 0) -> Entropy:
    """Entropy with all keys, or without the first `sinks`, the rest renormalised.

    A step that sees one key has no defined normalised entropy and gets 0.
    """
    rest = normalised(a[..., sinks:])
    h = -torch.xlogy(rest, rest).sum(-1)
    seen = torch.arange(length + 1, length + 1 + a.shape[-2], device=a.device) - sinks
    most = torch.log(seen.to(a.dtype))
    return Entropy(torch.where(most > 0, h / most, 0.0), h.exp())


def top_positions(a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` positions with most weight and their weights, `[..., T, k]`, best first; of equal ones the earlier."""
    order = a.sort(dim=-1, descending=True, stable=True)
    return order.indices[..., :k], order.values[..., :k]


def mass_by_region(a: Tensor, region_J: Tensor, regions: int) -> Tensor:
    """Weight on each region of positions, `[..., T, regions]`.

    Args:
        a: weights `[..., T, J]`. region_J: number of the region of each key, in `[0, regions)`: sinks, system, rest of
        the prompt, window, generated. regions: how many there are.

    Raises:
        ProbeError: a key has no region.
    """
    if len(region_J) != a.shape[-1] or int(region_J.min()) < 0 or int(region_J.max()) >= regions:
        raise ProbeError(f"regions must number all {a.shape[-1]} keys from 0 to {regions - 1}")
    one_hot = torch.nn.functional.one_hot(region_J, regions).to(a.dtype)
    return a @ one_hot


def jump_scores(a: Tensor, length: int, *, memory: int = 4) -> Tensor:
    """Jensen-Shannon divergence between a step and the mean of the `memory` steps before it, over prompt keys, `[...,
    T]`.

    The first `memory` steps have no full past and are NaN.
    """
    p = normalised(a[..., :length])
    steps = p.shape[-2]
    if steps <= memory:
        return p.new_full(p.shape[:-1], torch.nan)
    past = p.unfold(-2, memory, 1)[..., :-1, :, :].mean(-1)
    out = p.new_full(p.shape[:-1], torch.nan)
    out[..., memory:] = jensen_shannon(p[..., memory:, :], past)
    return out
