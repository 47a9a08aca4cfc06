"""AdaKV: heads of a layer compete for one budget."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register
from sglang_probe.eviction.select import share_out, top_k
from sglang_probe.eviction.wrapper import Wrapper


@register("adakv", source="arXiv 2407.11550")
class AdaKV(Wrapper):
    """Budgets per head from the layer's highest scores over all heads; scores and always-kept set are the base's.

    `mix` is the paper's rule: alpha of the uniform budget and 1 - alpha of the head's share of the layer's top scores,
    both without the always-kept positions. `floor` is kvpress's: each head first keeps its best alpha share of the
    budget, always-kept positions included, and the rest of the layer's budget goes to the highest scores left.
    """

    alpha: float = Field(default=0.2, ge=0, le=1)
    safeguard: Literal["mix", "floor"] = "mix"

    def budgets(self, layer: Layer, budget: int) -> Tensor:
        """Positions per head; they sum to the base's budgets over the heads of the layer."""
        uniform = self.base.budgets(layer, budget)
        scores = self.base.scores(layer)
        protected = self.base.protected(layer, budget).to(scores.device).expand(scores.shape)
        if self.safeguard == "floor":
            least = torch.maximum((uniform * self.alpha).floor().to(torch.int64).clamp(min=1), protected.sum(-1))
            safe = top_k(scores, least.minimum(uniform), protected)
            return _share_of_top(scores, safe, uniform.sum(-1))
        fixed = protected.sum(-1)
        free = uniform - fixed
        total = free.sum(-1)
        won = _share_of_top(scores, protected, uniform.sum(-1)) - fixed
        mixed = (1 - self.alpha) * won + self.alpha * free
        # A head cannot hold more than its candidates; with equal candidates per head neither term exceeds them.
        return share_out(mixed.to(torch.float64), total) + fixed


def _share_of_top(scores_GL: Tensor, always_GL: Tensor, total: Tensor) -> Tensor:
    """How many of the `total` highest scores of a layer each head holds, `always_GL` counted first."""
    keep = top_k(scores_GL.flatten(-2), total, always_GL.flatten(-2))
    return torch.unflatten(keep, -1, scores_GL.shape[-2:]).sum(-1)
