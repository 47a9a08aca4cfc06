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


def generated_mass(a: Tensor, length: int) -> Tensor:
    """Weight on generated tokens, `[..., T]`. Where it nears 1, evicting the prompt no longer matters."""
    return a[..., length:].sum(-1)


def generated_mass_uniform(length: int, steps: int) -> Tensor:
    """The same if every visible key had equal weight, `[T]`."""
    generated = torch.arange(1, steps + 1, dtype=torch.float64)
    return generated / (length + generated)


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


def jump_prominence(a: Tensor, length: int, *, memory: int = 4) -> Tensor:
    """Largest jump score over the median one, `[...]`. A change of phase is one large jump among small ones."""
    z = jump_scores(a, length, memory=memory)[..., memory:]
    return z.amax(-1) / z.median(-1).values


def jump_null(a: Tensor, length: int, *, memory: int = 4, permutations: int = 100, seed: int = 0) -> Tensor:
    """`jump_prominence` of each head when the steps of the response are shuffled, `[permutations, ...]`.

    Shuffling destroys the order and keeps every step's distribution. It has to be the prominence: in a shuffled
    response with two phases every second step jumps, so the largest jump alone is as large as in the true order.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(a.shape[-2], generator=generator) for _ in range(permutations)]
    return torch.stack([jump_prominence(a[..., order, :], length, memory=memory) for order in orders])


def agreeing_heads(jumps: Tensor, *, within: int = 1) -> Tensor:
    """Share of heads that jump within ±`within` steps of each step, `[T]`, from flags `[..., T]`."""
    flags = jumps.flatten(0, -2).to(torch.float32)
    near = torch.nn.functional.max_pool1d(flags[:, None], 2 * within + 1, stride=1, padding=within)[:, 0]
    return near.mean(0)
