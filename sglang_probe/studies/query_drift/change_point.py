"""Phase jumps: is there a step from which on the prompt is read differently, and do heads agree where?

A CUSUM over the steps of one response: for every split the Jensen-Shannon divergence between the mean attention before
and after it, weighted by how evenly it splits (Page 1954; for a change of mean: Csörgő and Horváth 1997).

Neighbouring steps resemble each other, and that alone makes the largest split larger than in steps of random order. So
the null is the same steps in random order of *blocks* (Künsch 1989; Kirch 2007 for change points), twice as long as the
autocorrelation time of what is left when the change that was found is taken out. Blocks keep less than all of the
likeness of neighbours; the statistic of the null is raised by what they lose, in the variance of a mean. Simulated
levels at a nominal 5 %: 0 to 10 % for an autocorrelation of neighbours of 0 to 0.8 and 40 to 120 steps; with 40 steps
and 0.6 or more there are too few blocks to find even a clear jump. Slow drift still breaks the null as a jump does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_probe.errors import ProbeError
from sglang_probe.stats.distance import jensen_shannon

_LIKE = 0.1
"""Autocorrelation below which steps count as unrelated."""


@dataclass(frozen=True)
class ChangePoint:
    """The most likely change of each head, `[...]`."""

    step: Tensor
    """First step after the change."""
    score: Tensor
    """CUSUM statistic there."""
    p_value: Tensor
    """Share of orders, the true one included, whose largest statistic is as large; never below 1 / (permutations +
    1)."""
    block: Tensor
    """Steps per block of the null."""


def change_point(a: Tensor, length: int, *, margin: int = 4, permutations: int = 39, seed: int = 0) -> ChangePoint:
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
    best = cusum(p, margin).max(-1)
    at = best.indices + margin
    block, raised = blocks(p, at)
    generator = torch.Generator().manual_seed(seed)
    at_least = torch.ones_like(best.values)
    for size in sorted(set(block.flatten().tolist())):
        mine = block == size
        for _ in range(permutations):
            order = block_order(steps, size, generator)
            largest = raised[mine] * cusum(p[mine][..., order, :], margin).amax(-1)
            at_least[mine] += (largest >= best.values[mine]).to(at_least.dtype)
    return ChangePoint(at, best.values, at_least / (permutations + 1), block)


def blocks(p: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Length of blocks `[...]`, and by how much the variance of a mean exceeds what shuffled blocks of it have.

    Args:
        p: distributions `[..., T, n]`.
        at: step of the change that is taken out first, `[...]`: a jump is not autocorrelation.
    """
    steps = p.shape[-2]
    after = (torch.arange(steps, device=p.device) >= at[..., None])[..., None].to(p.dtype)

    def mean(mask: Tensor) -> Tensor:
        return (p * mask).sum(-2, keepdim=True) / mask.sum(-2, keepdim=True)

    rest = p - after * mean(after) - (1 - after) * mean(1 - after)
    power = (rest * rest).sum((-1, -2)) / steps
    lags = range(1, max(2, steps // 2))
    like = torch.stack([(rest[..., k:, :] * rest[..., :-k, :]).sum((-1, -2)) / (steps - k) for k in lags], -1)
    like = like / power[..., None].clamp(min=torch.finfo(p.dtype).tiny)
    # Up to the first lag at which nothing is left of it: beyond that it is noise.
    like = like * (like > _LIKE).to(p.dtype).cumprod(-1)
    time = 1 + 2 * like.sum(-1)
    size = torch.where(like[..., 0] > 0, (2 * time).ceil().long(), 1).clamp(max=max(1, steps // 4))
    lag = torch.arange(1, like.shape[-1] + 1, device=p.device)
    kept = 1 + 2 * (like * (1 - lag / size[..., None]).clamp(min=0)).sum(-1)
    return size, time / kept


def block_order(steps: int, size: int, generator: torch.Generator) -> Tensor:
    """Steps in random order of blocks; where the first block is cut is random, too."""
    first = int(torch.randint(size, (1,), generator=generator))
    starts = torch.tensor([0, *range(first or size, steps, size), steps])
    order = torch.randperm(len(starts) - 1, generator=generator).tolist()
    return torch.cat([torch.arange(int(starts[i]), int(starts[i + 1])) for i in order])


def cusum(p: Tensor, margin: int) -> Tensor:
    """Statistic of each split from step `margin` on, `[..., T - 2 margin + 1]`, of distributions `[..., T, n]`."""
    steps = p.shape[-2]
    before = p.cumsum(-2)
    split = torch.arange(margin, steps - margin + 1, device=p.device)
    left = before[..., split - 1, :]
    right = before[..., -1:, :] - left
    weight = (split * (steps - split)).to(p.dtype) / steps**2
    return weight * jensen_shannon(left.clamp(min=0), right.clamp(min=0))
