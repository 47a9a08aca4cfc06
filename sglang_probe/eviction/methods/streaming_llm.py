"""StreamingLLM: sinks and the most recent positions."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sglang_probe.eviction.base import Method
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register


@register("streaming_llm", source="arXiv 2309.17453")
class StreamingLLM(Method):
    """Keep the first `sinks` positions and fill the budget with the most recent ones.

    Positions keep their original rotation; the paper renumbers them inside the cache.
    """

    sinks: int = Field(default=4, ge=0)

    def scores(self, layer: Layer) -> Tensor:
        """The position itself."""
        return torch.arange(layer.length, dtype=torch.float32, device=layer.k_LGD.device).expand(layer.shape_GL)
