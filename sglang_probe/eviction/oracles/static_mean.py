"""Static-mean oracle: the positions that decoding will read most in sum."""

from __future__ import annotations

from torch import Tensor

from sglang_probe.eviction.base import Oracle
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register


@register("static_mean", source="oracle; maximises the pooled attention mass of each kv head")
class StaticMean(Oracle):
    """Sum of the full-cache attention over decode steps and query heads of the group.

    It is the optimum of pooled mass for its always-kept set and of no other metric.
    """

    def scores(self, layer: Layer) -> Tensor:
        """Future attention received."""
        return layer.future_attention[..., : layer.length].sum((-3, -2))
