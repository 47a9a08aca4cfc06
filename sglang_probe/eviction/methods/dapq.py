"""DapQ: score with pseudo queries at the positions that the answer will have."""

from __future__ import annotations

from pydantic import Field

from sglang_probe.eviction.lookahead import LookaheadScorer
from sglang_probe.eviction.registry import register
from sglang_probe.eviction.scoring import GroupReduction, Pooling, Softmax


@register("dapq", source="arXiv 2603.11564")
class DapQ(LookaheadScorer):
    """Sum of the attention of N pseudo tokens appended to the prompt at positions L … L + N - 1.

    Their content is chosen when they are generated (the paper: the first few and the last prompt tokens). The paper
    states neither pooling nor the reduction over the group; the defaults take its formula literally and the common
    mean. The pseudo tokens are part of the forward pass, so the softmax runs over them too.
    """

    queries: str = "dapq"
    steps: int = Field(default=32, ge=1)
    window: int = Field(default=0, ge=0)
    recent: int = Field(default=0, ge=0)
    softmax: Softmax = "visible"
    pooling: Pooling = "none"
    gqa: GroupReduction = "mean"
