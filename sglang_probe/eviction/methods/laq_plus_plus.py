"""LAQ++: lookahead queries together with the last prompt queries."""

from __future__ import annotations

from pydantic import Field

from sglang_probe.eviction.methods.laq import LAQ
from sglang_probe.eviction.registry import register


@register("laq++", source="arXiv 2505.20334")
class LAQPlusPlus(LAQ):
    """LAQ with the last 8 prompt queries beside the lookahead queries, each under its own causal mask."""

    window: int = Field(default=8, ge=0)
