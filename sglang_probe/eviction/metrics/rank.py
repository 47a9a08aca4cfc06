"""Agreement of two rankings of positions: NDCG, rank-biased overlap, Kendall's tau on the top sets.

Correlations over all positions are dominated by the irrelevant tail and are left out. Inputs are scores `[..., n]`; of
equal scores the earlier position ranks first. With `kept` the ranking is that of a kept set: its positions, in the
order of the scores, and nothing after them. A ranking that is judged by its scores alone does not know what was
protected, or how a budget was spread over heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_probe.eviction.select import ranks


def ndcg(predicted: Tensor, gold: Tensor, depth: int, *, kept: Tensor | None = None) -> Tensor:
    """Discounted gain of the first `depth` predicted positions over the best possible, gain = gold mass, `[...]`.

    Source: Järvelin and Kekäläinen 2002, discount 1 / log2(rank + 1).

    Args:
        kept: bool, as `predicted`. All that is kept counts, and nothing else; above 1 where a head keeps more than
            `depth`.
    """
    best = _dcg(gold, ranks(gold), depth)
    if kept is None:
        return _dcg(gold, ranks(predicted), depth) / best
    return _dcg(torch.where(kept, gold, 0.0), _kept_first(predicted, kept), gold.shape[-1]) / best


def ndcg_chance(gold: Tensor, depth: int, *, kept: Tensor | None = None) -> Tensor:
    """Expected NDCG of a random ranking, or of as many random positions as are `kept`, `[...]`. Exact: every rank holds
    the mean gain."""
    total: Tensor = _discount(min(depth, gold.shape[-1]), gold).sum()
    if kept is not None:
        upto = torch.cat([gold.new_zeros(1), _discount(gold.shape[-1], gold).cumsum(0)])
        total = upto[kept.sum(-1)]
    return gold.mean(-1) * total / _dcg(gold, ranks(gold), depth)


def rbo(a: Tensor, b: Tensor, *, p: float = 0.9, kept: Tensor | None = None) -> Tensor:
    """Rank-biased overlap of two full rankings, `[...]`, 1 for equal ones.

    Sum over depths d of `(1 - p) p^(d-1)` times the overlap of the top d, divided by d; below the last position the
    overlap is complete (with `kept`, the kept share), so that the infinite sum is exact. Source: Webber, Moffat and
    Zobel 2010.
    """
    n = a.shape[-1]
    rank = ranks(a) if kept is None else _kept_first(a, kept)
    # A position is in both top-d sets once d exceeds the worse of its two ranks.
    worse = torch.maximum(rank, ranks(b))
    counted = torch.ones_like(worse) if kept is None else kept.expand_as(worse).to(worse.dtype)
    common = torch.zeros_like(worse).scatter_add_(-1, worse, counted).cumsum(-1)
    depth = torch.arange(1, n + 1, device=a.device, dtype=torch.float64)
    return ((1 - p) * p ** (depth - 1) * common / depth).sum(-1) + p**n * counted.double().mean(-1)


def rbo_chance(n: int, *, p: float = 0.9, kept: Tensor | None = None) -> Tensor:
    """Expected `rbo` of a ranking of n positions with a random one, or with as many random positions as are `kept`.
    Exact: the top d share d²/n positions, or d times what is kept of the top d over n."""
    depth = torch.arange(1, n + 1, dtype=torch.float64)
    size = torch.tensor(float(n)) if kept is None else kept.sum(-1).double()
    overlap = torch.minimum(depth, size[..., None]) / n
    return ((1 - p) * p ** (depth - 1) * overlap).sum(-1) + p**n * size / n


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


def _kept_first(scores: Tensor, kept: Tensor) -> Tensor:
    """Ranks by score among what is kept, and after it the rest."""
    rank = ranks(scores)
    return ranks(-torch.where(kept, rank, rank + scores.shape[-1]).to(torch.float64))


def _signs(x: Tensor) -> Tensor:
    return torch.sign(x[..., :, None] - x[..., None, :]).to(torch.float64)


def _dcg(gain: Tensor, rank: Tensor, depth: int) -> Tensor:
    depth = min(depth, gain.shape[-1])
    ordered = torch.empty_like(gain).scatter_(-1, rank, gain)
    return (ordered[..., :depth] * _discount(depth, gain)).sum(-1)


def _discount(depth: int, like: Tensor) -> Tensor:
    return 1 / torch.log2(torch.arange(2, depth + 2, device=like.device, dtype=like.dtype))
