"""Phase jumps: is there a step from which on the prompt is read differently, and do heads agree where?

A CUSUM over the steps of one response: for every split the Jensen-Shannon divergence between the mean attention before
and after it, weighted by how evenly it splits (Page 1954; for a change of mean: Csörgő and Horváth 1997). Steps in
random order are the null, which holds for exchangeable steps alone: slow drift breaks it as a jump does, and so does
any likeness of neighbouring steps. A rejection says that the order of the steps matters, and no more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_probe.errors import ProbeError
from sglang_probe.stats.distance import jensen_shannon


@dataclass(frozen=True)
class ChangePoint:
    """The most likely change of each head, `[...]`."""

    step: Tensor
    """First step after the change."""
    score: Tensor
    """CUSUM statistic there."""
    p_value: Tensor
    """Share of orders of the steps, the true one included, whose largest statistic is as large; never below
    1 / (permutations + 1)."""


def change_point(a: Tensor, length: int, *, margin: int = 4, permutations: int = 19, seed: int = 0) -> ChangePoint:
    """Find one change in the attention over the prompt.

    Args:
        a: weights of the decode steps `[..., T, J]`, the prompt's `length` keys first.
        margin: fewest steps on each side of a change.

    Raises:
        ProbeError: fewer than two margins of steps.
    """
    steps = a.shape[-2]
    if steps < 2 * margin:
        raise ProbeError(f"a change point needs {2 * margin} steps; there are {steps}")
    p = a[..., :length]
    p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    scores = cusum(p, margin)
    best = scores.max(-1)
    generator = torch.Generator().manual_seed(seed)
    at_least = torch.ones_like(best.values)
    for _ in range(permutations):
        order = torch.randperm(steps, generator=generator)
        at_least += cusum(p[..., order, :], margin).amax(-1) >= best.values
    return ChangePoint(best.indices + margin, best.values, at_least / (permutations + 1))


def cusum(p: Tensor, margin: int) -> Tensor:
    """Statistic of each split from step `margin` on, `[..., T - 2 margin + 1]`, of distributions `[..., T, n]`."""
    steps = p.shape[-2]
    before = p.cumsum(-2)
    split = torch.arange(margin, steps - margin + 1, device=p.device)
    left = before[..., split - 1, :]
    right = before[..., -1:, :] - left
    weight = (split * (steps - split)).to(p.dtype) / steps**2
    return weight * jensen_shannon(left.clamp(min=0), right.clamp(min=0))
