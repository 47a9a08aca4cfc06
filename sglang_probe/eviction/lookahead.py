"""The score that lookahead methods share: attention of some prompt queries and of queries that stand for the answer."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from sglang_probe.eviction.base import Method
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.scoring import (
    GroupReduction,
    Order,
    Pooling,
    Softmax,
    lookahead_attention,
    pool_and_reduce,
)


class LookaheadScorer(Method):
    """Sum of the attention of the last `window` prompt queries and of up to `steps` lookahead queries.

    The lookahead queries are an input, `Layer.lookahead[queries]`: how they are generated is part of the experiment.
    """

    queries: str
    """Name of the lookahead queries in the Layer."""
    steps: int = Field(ge=1)
    """Lookahead queries that score, at most."""
    window: int = Field(ge=0)
    """Prompt queries that score beside them."""
    recent: int = Field(ge=0)
    softmax: Softmax
    pooling: Pooling
    kernel: int = Field(default=7, ge=1)
    gqa: GroupReduction
    order: Order = "pool_then_group"

    def scores(self, layer: Layer) -> Tensor:
        """Attention received; lookahead rows see the whole prompt, window rows the prompt up to their own place."""
        ahead = layer.lookahead_queries(self.queries, self.steps)
        total = lookahead_attention(layer, ahead, self.softmax).sum(-2)
        if self.window:
            total = total + layer.prompt_attention(self.window).sum(-2)
        return pool_and_reduce(
            total, pooling=self.pooling, kernel=self.kernel, gqa=self.gqa, order=self.order, recent=self.recent
        )
