"""Observed attention: what each key received from the prompt, per query that could see it."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from sglang_probe.attention.weights import attention_received, visible
from sglang_probe.eviction.base import Method
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register
from sglang_probe.eviction.scoring import GroupReduction, reduce_group


@register("observed_attention", source="kvpress; a normalised relative of H2O, arXiv 2306.14048")
class ObservedAttention(Method):
    """Mean weight received over the prompt queries that see the key. Needs the queries of the whole prompt."""

    recent: int = Field(default=0, ge=0)
    gqa: GroupReduction = "mean"

    def scores(self, layer: Layer) -> Tensor:
        """Received attention divided by the number of queries that see the key."""
        q = layer.last_queries(layer.length)
        seen_L = visible(layer.length, layer.length, layer.spec, first=0, device=q.device).sum(0)
        return reduce_group(attention_received(q, layer.k_LGD, layer.spec, first=0), self.gqa) / seen_L
