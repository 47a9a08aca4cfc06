"""Causal refreshed reference: SnapKV's score taken again every few steps, with the queries decoded so far."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sglang_probe.attention.weights import attention_weights
from sglang_probe.eviction.base import Oracle, Selection
from sglang_probe.eviction.layer import Layer, Queries
from sglang_probe.eviction.registry import register
from sglang_probe.eviction.scoring import GroupReduction, Order, Pooling, pool_and_reduce
from sglang_probe.eviction.select import top_k


@register("causal_refreshed", source="oracle; what an observation window that moves with decoding would keep")
class CausalRefreshed(Oracle):
    """Attention over the prompt of the last `window` queries before the refresh, prompt and decoded ones alike.

    It uses no query from the future, but every refresh chooses from the whole prompt, which a cache that evicted no
    longer has; and its queries are those of the full-cache run.
    """

    refresh: int = Field(default=8, ge=1)
    """Decode steps between two scorings; the first is at the end of the prompt."""
    window: int = Field(default=32, ge=1)
    pooling: Pooling = "max"
    kernel: int = Field(default=7, ge=1)
    gqa: GroupReduction = "mean"
    order: Order = "pool_then_group"

    def scores(self, layer: Layer) -> Tensor:
        """Scores in force at each decode step, `[..., T, G, L]`."""
        future: Queries = layer.require("future")
        before = layer.prompt_attention(self.window)
        after = attention_weights(future.q_THD, layer.k_LGD, layer.spec, first=layer.length)
        rows = torch.cat([before, after], -2)
        # Sums over any window of rows are differences of running sums; float64 keeps the difference exact enough.
        running = torch.nn.functional.pad(rows.to(torch.float64).cumsum(-2), (0, 0, 1, 0))
        steps = torch.arange(future.skip, future.q_THD.shape[-3], device=rows.device)
        # With a question in front, its queries are known before the first scored step.
        end = before.shape[-2] + future.skip + (steps - future.skip) // self.refresh * self.refresh
        start = (end - self.window).clamp(min=0)
        sums_GRTL = (running[..., end, :] - running[..., start, :]).clamp(min=0).to(rows.dtype)
        return pool_and_reduce(
            sums_GRTL.movedim(-2, -4),
            pooling=self.pooling,
            kernel=self.kernel,
            gqa=self.gqa,
            order=self.order,
            recent=self.recent,
        )

    def select(self, layer: Layer, budget: int) -> Selection:
        """A set for each step, constant between refreshes."""
        scores = self.scores(layer)
        return Selection(top_k(scores, budget, self.protected(layer, budget)), scores, evicts=False)
