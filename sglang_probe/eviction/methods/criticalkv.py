"""CriticalKV: half of the budget by the base's score, half by score times the projected value."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from sglang_probe.eviction.base import Selection
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register
from sglang_probe.eviction.scoring import GroupReduction, reduce_group, value_norms
from sglang_probe.eviction.select import top_k
from sglang_probe.eviction.wrapper import Wrapper


@register("criticalkv", source="arXiv 2502.03805")
class CriticalKV(Wrapper):
    """Second-stage score: `(s + epsilon) ‖v W_O‖₁`, the norm reduced over the group.

    The published epsilon is for scores that are means over the window (`rows: mean` of snapkv).

    The first stage keeps the best `first_stage` share of each head's budget, always-kept positions included. Around
    `adakv` this is CriticalAdaKV: the budgets come from the base's scores, the choice within a head from both stages.
    Base scores should be non-negative, as the factor would turn the order of negative ones around.
    """

    epsilon: float = Field(default=1e-4, ge=0)
    first_stage: float = Field(default=0.5, ge=0, le=1)
    gqa: GroupReduction = "mean"

    def scores(self, layer: Layer) -> Tensor:
        """Second-stage scores."""
        norms = reduce_group(value_norms(layer, projected=True), self.gqa)
        return (self.base.scores(layer) + self.epsilon) * norms

    def select(self, layer: Layer, budget: int) -> Selection:
        """Two stages under the base's budgets."""
        budgets = self.budgets(layer, budget)
        protected = self.protected(layer, budget)
        first = (budgets * self.first_stage).floor().long().maximum(protected.sum(-1)).minimum(budgets)
        chosen = top_k(self.base.scores(layer), first, protected)
        scores = self.scores(layer)
        keep = top_k(scores, budgets, chosen)
        return Selection(keep.unsqueeze(-3), scores.unsqueeze(-3), evicts=True)
