"""Agreement of two rankings of the candidates: NDCG, rank-biased overlap, Kendall's tau on the top sets.

Correlations over all positions are dominated by the irrelevant tail and are left out. Inputs are scores `[..., n]` over
candidates only (index with `~trivial_L` first); of equal scores the earlier position ranks first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_probe.eviction.select import ranks


def ndcg(predicted: Tensor, gold: Tensor, depth: int) -> Tensor:
    """Discounted gain of the first `depth` predicted positions over the best possible, gain = gold mass, `[...]`.

    Source: Järvelin and Kekäläinen 2002, discount 1 / log2(rank + 1).
    """
    return _dcg(gold, ranks(predicted), depth) / _dcg(gold, ranks(gold), depth)


def ndcg_chance(gold: Tensor, depth: int) -> Tensor:
    """Expected NDCG of a random ranking, `[...]`. Exact: every rank holds the mean gain."""
    total = _discount(min(depth, gold.shape[-1]), gold).sum()
    return gold.mean(-1) * total / _dcg(gold, ranks(gold), depth)


def rbo(a: Tensor, b: Tensor, *, p: float = 0.9) -> Tensor:
    """Rank-biased overlap of two full rankings, `[...]`, 1 for equal ones.

    Sum over depths d of `(1 - p) p^(d-1)` times the overlap of the top d, divided by d; below the last candidate the
    overlap is complete, so that the infinite sum is exact. Source: Webber, Moffat and Zobel 2010.
    """
    n = a.shape[-1]
    # A position is in both top-d sets once d exceeds the worse of its two ranks.
    worse = torch.maximum(ranks(a), ranks(b))
    common = torch.zeros_like(worse).scatter_add_(-1, worse, torch.ones_like(worse)).cumsum(-1)
    depth = torch.arange(1, n + 1, device=a.device, dtype=torch.float64)
    return ((1 - p) * p ** (depth - 1) * common / depth).sum(-1) + p**n


def rbo_chance(n: int, *, p: float = 0.9) -> float:
    """Expected `rbo` of a ranking of n positions with a random one. Exact: the top d share d²/n positions."""
    depth = torch.arange(1, n + 1, dtype=torch.float64)
    return float(((1 - p) * p ** (depth - 1) * depth / n).sum() + p**n)


def kendall_top(a: Tensor, b: Tensor, depth: int) -> Tensor:
    """Kendall's tau-b over the union of the two top-`depth` sets, `[...]`; NaN where one side ties throughout.

    Being chosen by either ranking selects for disagreement, so that unrelated rankings score below 0.
    """
    member = (ranks(a) < depth) | (ranks(b) < depth)
    # The union has at most twice `depth` members: gather those, and mask what is beyond a smaller union.
    size = min(2 * depth, a.shape[-1])
    at = member.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :size]
    inside = member.gather(-1, at)
    pair = inside[..., :, None] & inside[..., None, :]
    x, y = (_signs(s.gather(-1, at)).masked_fill(~pair, 0) for s in (a, b))
    norm = (x.abs().sum((-1, -2)) * y.abs().sum((-1, -2))).sqrt()
    return (x * y).sum((-1, -2)) / norm


def _signs(x: Tensor) -> Tensor:
    return torch.sign(x[..., :, None] - x[..., None, :]).to(torch.float64)


def _dcg(gain: Tensor, rank: Tensor, depth: int) -> Tensor:
    depth = min(depth, gain.shape[-1])
    ordered = torch.empty_like(gain).scatter_(-1, rank, gain)
    return (ordered[..., :depth] * _discount(depth, gain)).sum(-1)


def _discount(depth: int, like: Tensor) -> Tensor:
    return 1 / torch.log2(torch.arange(2, depth + 2, device=like.device, dtype=like.dtype))
