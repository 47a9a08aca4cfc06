"""SnapKV: the attention of the last prompt queries, pooled over positions."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from sglang_probe.eviction.base import Method
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register
from sglang_probe.eviction.scoring import GroupReduction, Order, Pooling, pool_and_reduce


@register("snapkv", source="arXiv 2404.14469")
class SnapKV(Method):
    """Sum over the last `window` prompt queries of their attention, pooled, then reduced over the group.

    The original code evicts per query head (`Layer.per_query_head`); `gqa: mean` is what later comparisons use. Papers
    use windows from 8 to 64 and average-pooling 5 or max-pooling 7.
    """

    window: int = Field(default=32, ge=1)
    """Prompt queries that score."""
    recent: int = Field(default=32, ge=0)
    """Always kept; follows `window` unless given."""
    rows: Literal["sum", "mean"] = "sum"
    """Over the window. It changes no ranking by itself, but it does change what CriticalKV's epsilon means."""
    pooling: Pooling = "max"
    kernel: int = Field(default=7, ge=1)
    gqa: GroupReduction = "mean"
    order: Order = "pool_then_group"

    @model_validator(mode="before")
    @classmethod
    def _recent_follows_window(cls, data: dict[str, Any]) -> dict[str, Any]:
        return {"recent": data["window"], **data} if "window" in data else data

    def scores(self, layer: Layer) -> Tensor:
        """Attention received from the window; the always-kept last positions are not pooled."""
        a_GRNL = layer.prompt_attention(self.window)
        return pool_and_reduce(
            a_GRNL.sum(-2) if self.rows == "sum" else a_GRNL.mean(-2),
            pooling=self.pooling,
            kernel=self.kernel,
            gqa=self.gqa,
            order=self.order,
            recent=self.recent,
        )
