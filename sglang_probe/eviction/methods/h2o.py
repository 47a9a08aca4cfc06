"""H2O: heavy hitters by a running sum of received attention, without looking ahead."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sglang_probe.attention.weights import attention_logits, attention_received, visible
from sglang_probe.eviction.base import Method, Selection
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register
from sglang_probe.eviction.scoring import GroupReduction, reduce_group
from sglang_probe.eviction.select import check_budget, protected_mask

_BLOCK = 256
"""Rows whose logits are held at once."""


@register("h2o", source="arXiv 2306.14048")
class H2O(Method):
    """Half of the budget for the keys with the largest running sum, half for the most recent ones.

    `greedy` is the algorithm: positions arrive one by one, a query attends to what is still kept, its weights are added
    to the sums, and the lowest entry outside the recent part is dropped for good. `once` sums the full causal attention
    of the prompt and evicts at its end, which is what comparisons often call H2O. Neither uses a query after the
    prompt; the original simulation mode does.
    """

    eviction: Literal["greedy", "once"] = "greedy"
    recent_share: float = Field(default=0.5, ge=0, le=1)
    """Part of the budget kept for the most recent positions, at least `recent`."""
    gqa: GroupReduction = "mean"

    def protected(self, layer: Layer, budget: int) -> Tensor:
        """Sinks and the recent share of the budget."""
        return protected_mask(layer.length, sinks=self.sinks, recent=self._recent(budget))

    def scores(self, layer: Layer) -> Tensor:
        """Sum over all prompt queries of the attention received with nothing evicted."""
        q = layer.last_queries(layer.length)
        return reduce_group(attention_received(q, layer.k_LGD, layer.spec, first=0), self.gqa)

    def select(self, layer: Layer, budget: int) -> Selection:
        """As `eviction` says; `greedy` loops over the positions beyond the budget, batched over everything else."""
        if self.eviction == "once" or budget >= layer.length:
            return super().select(layer, budget)
        check_budget(torch.tensor(budget), self.protected(layer, budget))
        q, length, recent = layer.last_queries(layer.length), layer.length, self._recent(budget)
        fixed = torch.arange(length, device=q.device) < self.sinks
        keep = torch.zeros(layer.shape_GL, dtype=torch.bool, device=q.device)
        keep[..., :budget] = True
        start = attention_received(q[..., :budget, :, :], layer.k_LGD, layer.spec, first=0)
        total = reduce_group(start, self.gqa)
        for first in range(budget, length, _BLOCK):
            rows = q[..., first : first + _BLOCK, :, :]
            logits = attention_logits(rows, layer.k_LGD, layer.spec)
            seen = visible(rows.shape[-3], length, layer.spec, first=first, device=q.device)
            logits = logits.masked_fill(~seen, -torch.inf)
            for i in range(first, min(first + _BLOCK, length)):
                keep[..., i] = True
                row = logits[..., i - first, :].masked_fill(~keep[..., None, :], -torch.inf)
                total = total + reduce_group(torch.softmax(row, -1), self.gqa)
                safe = fixed.clone()
                safe[max(0, i + 1 - recent) : i + 1] = True
                # Of equal sums the later position goes: reversed, argmin finds it first.
                candidates = total.masked_fill(~keep | safe, torch.inf).flip(-1)
                keep.scatter_(-1, length - 1 - candidates.argmin(-1, keepdim=True), False)
        return Selection(keep.unsqueeze(-3), total.unsqueeze(-3), evicts=True)

    def _recent(self, budget: int) -> int:
        return max(self.recent, round(self.recent_share * budget))
