"""Protected LRU: evict what no recent query used."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sglang_probe.attention.weights import attention_blocks, visible
from sglang_probe.eviction.base import Method
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register


@register("protected_lru", source="baseline of arXiv 2605.18053; the definition of a use is ours")
class ProtectedLRU(Method):
    """Keep sinks, the last positions, and then those that a prompt query used last.

    A query uses a key when one of its heads in the group gives it more than `uses` times the uniform share of the keys
    that it sees. Writing a position counts as its first use, so a key that is never read again ages from its own place.
    """

    sinks: int = Field(default=4, ge=0)
    recent: int = Field(default=32, ge=0)
    uses: float = Field(default=1.0, gt=0)
    queries: int | None = Field(default=None, ge=1)
    """Last prompt queries that are looked at; None: the whole prompt."""

    def scores(self, layer: Layer) -> Tensor:
        """Index of the last prompt query that used the position."""
        q = layer.last_queries(layer.length if self.queries is None else self.queries)
        n, length = q.shape[-3], layer.length
        start = length - n
        seen = visible(n, length, layer.spec, first=start, device=q.device).sum(-1)
        last = torch.arange(length, device=q.device).expand(layer.shape_GL)
        for offset, a_GRNL in attention_blocks(q, layer.k_LGD, layer.spec, first=start):
            rows = torch.arange(offset, offset + a_GRNL.shape[-2], device=q.device)
            used = a_GRNL.amax(-3) > (self.uses / seen[rows])[:, None]
            last = torch.maximum(last, torch.where(used, start + rows[:, None], -1).amax(-2))
        return last.to(torch.float32)
