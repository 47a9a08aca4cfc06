"""Protected random: the baseline that regret and gap closed refer to."""

from __future__ import annotations

from pydantic import Field

from sglang_probe.eviction.methods.random import Random
from sglang_probe.eviction.registry import register


@register("protected_random", source="baseline; arXiv 2605.18053 shows why it is needed")
class ProtectedRandom(Random):
    """Sinks and the last positions are kept, the rest of the budget is drawn at random.

    Most of what scorers appear to gain over plain random eviction comes from keeping these positions.
    """

    sinks: int = Field(default=4, ge=0)
    recent: int = Field(default=32, ge=0)
