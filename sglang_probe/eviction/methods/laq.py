"""LAQ: score with the queries of lookahead tokens, generated under a compressed cache."""

from __future__ import annotations

from pydantic import Field

from sglang_probe.eviction.lookahead import LookaheadScorer
from sglang_probe.eviction.registry import register
from sglang_probe.eviction.scoring import GroupReduction, Pooling, Softmax


@register("laq", source="arXiv 2505.20334")
class LAQ(LookaheadScorer):
    """The paper's version: every lookahead query sees the whole prompt.

    The released code puts a causal triangle over the last prompt columns instead, which hides prompt keys from rows
    that should see them; that is another algorithm and not this one. It scores per query head; here `gqa` reduces the
    group.
    """

    queries: str = "laq"
    steps: int = Field(default=8, ge=1)
    window: int = Field(default=0, ge=0)
    recent: int = Field(default=32, ge=0)
    softmax: Softmax = "prompt"
    pooling: Pooling = "max"
    gqa: GroupReduction = "mean"
