"""SpecKV: score with the tokens of a draft, run through the target model."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from sglang_probe.eviction.lookahead import LookaheadScorer
from sglang_probe.eviction.registry import register
from sglang_probe.eviction.scoring import GroupReduction, Pooling, Softmax


@register("speckv", source="arXiv 2506.08373")
class SpecKV(LookaheadScorer):
    """Attention of the prompt window and of draft tokens, max-pooled, with the maximum over the group."""

    queries: str = "speckv"
    steps: int = Field(default=32, ge=1)
    window: int = Field(default=32, ge=0)
    recent: int = Field(default=32, ge=0)
    """Always kept; follows `window` unless given."""
    softmax: Softmax = "visible"
    pooling: Pooling = "max"
    gqa: GroupReduction = "max"

    @model_validator(mode="before")
    @classmethod
    def _recent_follows_window(cls, data: dict[str, Any]) -> dict[str, Any]:
        return {"recent": data["window"], **data} if "window" in data else data
