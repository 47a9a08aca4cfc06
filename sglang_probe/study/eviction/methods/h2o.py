"""H2O: heavy hitters by a running sum of received attention, without looking ahead."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sglang_probe.study.attention import attention_logits, attention_received, visible
from sglang_probe.study.eviction.base import Method, Selection
from sglang_probe.study.eviction.layer import Layer
from sglang_probe.study.eviction.registry import register
from sglang_probe.study.eviction.scoring import GroupReduction, reduce_group
from sglang_probe.study.eviction.select import protected_mask


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
        """As `eviction` says; `greedy` loops over the positions behind the budget, batched over everything else."""
        if self.eviction == "once" or budget >= layer.length:
            return super().select(layer, budget)
        # Refuses a budget below the always-kept set, as every method does.
        super().select(layer, budget)
        q = layer.last_queries(layer.length)
        logits = attention_logits(q, layer.k_LGD, layer.spec)
        seen = visible(layer.length, layer.length, layer.spec, first=0, device=q.device)
        logits = logits.masked_fill(~seen, -torch.inf)
        total = reduce_group(torch.softmax(logits[..., :budget, :], -1).sum(-2), self.gqa)
        keep = torch.zeros(layer.shape_GL, dtype=torch.bool, device=q.device)
        keep[..., :budget] = True
        fixed = torch.arange(layer.length, device=q.device) < self.sinks
        for i in range(budget, layer.length):
            keep[..., i] = True
            row = logits[..., i, :].masked_fill(~keep[..., None, :], -torch.inf)
            total = total + reduce_group(torch.softmax(row, -1), self.gqa)
            safe = fixed.clone()
            safe[max(0, i + 1 - self._recent(budget)) : i + 1] = True
            # Of equal sums the later position goes: reversed, argmin finds it first.
            candidates = total.masked_fill(~keep | safe, torch.inf).flip(-1)
            keep.scatter_(-1, layer.length - 1 - candidates.argmin(-1, keepdim=True), False)
        return Selection(keep.unsqueeze(-3), total.unsqueeze(-3), evicts=True)

    def _recent(self, budget: int) -> int:
        # The newest position has to be keepable: a budget of nothing but heavy hitters would drop it at once.
        return max(self.recent, round(self.recent_share * budget))
