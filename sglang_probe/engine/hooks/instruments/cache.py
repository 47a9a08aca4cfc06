"""Requests that say how they use the radix cache: `cache: read_only`, `write_only` or `off`.

The match that gives a request its prefix is the release's (`Release.bypass_hooks`), as is the flag by which SGLang
publishes nothing of one (`engine/hooks/requests.py` sets it).
"""

from __future__ import annotations

from typing import Any

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks.instruments.base import Instrument
from sglang_probe.engine.releases.base import Hook, Release


class CacheUse(Instrument):
    """See the module."""

    name = "cache"
    field = "cache"
    features = ("bypass",)

    @classmethod
    def hooks(cls, release: Release) -> list[Hook]:
        return release.bypass_hooks()

    def read_limit(self, ask: Ask, req: Any) -> int | None:
        return None if ask.reads else 0
