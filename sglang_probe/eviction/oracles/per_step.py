"""Per-step oracle: the best set for each decode step alone."""

from __future__ import annotations

from torch import Tensor

from sglang_probe.eviction.base import Oracle, Selection
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register
from sglang_probe.eviction.select import top_k


@register("per_step", source="oracle; upper bound of any selection such as Quest")
class PerStep(Oracle):
    """Highest attention of the step itself, summed over the group: no selection of this size holds more mass."""

    def scores(self, layer: Layer) -> Tensor:
        """Attention by decode step, `[..., T, G, L]`."""
        return layer.future_attention[..., : layer.length].sum(-3).movedim(-2, -3)

    def select(self, layer: Layer, budget: int) -> Selection:
        """A set for each step."""
        scores = self.scores(layer)
        return Selection(top_k(scores, budget, self.protected(layer, budget)), scores, evicts=False)
