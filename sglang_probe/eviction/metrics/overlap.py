"""Overlap of a kept set with the set that decoding would have chosen: hit rate, also called index recall.

Gold sets have b' candidates, the budget after the trivial set F. Trivial positions count on neither side.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sglang_probe.eviction.metrics.trivial import candidate_share
from sglang_probe.eviction.select import top_k

Gold = Literal["sum", "max", "per_step"]
"""How decode steps are put together: `sum` as LAQ, DapQ and Judge Q do, `max` for a position that one step needs,
`per_step` not at all."""


def gold_scores(a: Tensor, length: int, *, how: Gold = "sum", horizon: int | None = None) -> Tensor:
    """What decoding reads of each prompt position, `[..., T or 1, G, L]`.

    Args:
        a: `Layer.future_attention`, `[..., G, R, T, L + T]`.
        length: prompt positions L.
        how: see `Gold`; query heads of a group are summed (`max`: maximum).
        horizon: only the first decode steps.
    """
    prompt = a[..., :horizon, :length]
    if how == "per_step":
        return prompt.sum(-3).movedim(-2, -3)
    pooled = prompt.sum((-3, -2)) if how == "sum" else prompt.amax((-3, -2))
    return pooled.unsqueeze(-3)


def gold_set(gold_TGL: Tensor, trivial_L: Tensor, candidates: int) -> Tensor:
    """The `candidates` best positions outside F, bool `[..., T or 1, G, L]`; of equal ones the earlier."""
    free = torch.arange(gold_TGL.shape[-1], device=gold_TGL.device)[~trivial_L]
    none = torch.zeros(len(free), dtype=torch.bool)
    out = torch.zeros(gold_TGL.shape, dtype=torch.bool, device=gold_TGL.device)
    out[..., free] = top_k(gold_TGL[..., free], candidates, none)
    return out


def hit_rate(keep_TGL: Tensor, gold_TGL: Tensor) -> Tensor:
    """Share of a gold set that is kept, `|S ∩ M| / |M|`, `[..., T or 1, G]`."""
    return (keep_TGL & gold_TGL).sum(-1).to(torch.float32) / gold_TGL.sum(-1)


def hit_chance(keep_TGL: Tensor, trivial_L: Tensor) -> Tensor:
    """Expected hit rate of random candidates, as many per head as are kept, `[..., T or 1, G]`. Exact.

    It is b' / |C| for a policy that keeps F, and more for one that spends F's share on candidates.
    """
    return candidate_share(keep_TGL, trivial_L)


def jaccard(hit: Tensor) -> Tensor:
    """Jaccard index of two sets of equal size from their hit rate."""
    return hit / (2 - hit)
