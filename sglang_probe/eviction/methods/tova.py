"""TOVA: the attention of the last query, one set for the whole layer."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from sglang_probe.eviction.base import Method
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register


@register("tova", source="arXiv 2401.06104")
class TOVA(Method):
    """Attention of the last prompt query, averaged over all query heads of the layer, once at the end of the prompt."""

    recent: int = Field(default=1, ge=0)

    def scores(self, layer: Layer) -> Tensor:
        """The same scores for every kv head."""
        a_L = layer.prompt_attention(1).mean((-4, -3)).squeeze(-2)
        return a_L[..., None, :].expand(layer.shape_GL)
