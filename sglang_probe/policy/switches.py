"""What SGLang can change while it runs, and how a request says that it bypasses the cache."""

from __future__ import annotations

from typing import Literal

from sglang_probe.config import Config

CacheUse = Literal["on", "off", "read_only", "write_only"]


class Switches(Config):
    """Settings of a running, idle engine; by default as the engine was started.

    Named like the server arguments they stand for. They were changed in a running SGLang 0.5.23 and compared with an
    engine started with the argument (`tests/end_to_end/test_switches.py`).
    """

    radix_cache: bool = True
    """False: nothing is matched and nothing published, as with `disable_radix_cache`."""
    chunked_prefill_size: int | None = None
    """Tokens a prefill chunk; 0 or less: no chunks."""
    enable_mixed_chunk: bool | None = None
    """Whether a prefill chunk and decode steps may share a forward pass."""
    schedule_policy: str | None = None
    """Order of the waiting queue, as SGLang names it."""


SWITCHABLE = frozenset(Switches.model_fields) - {"radix_cache"}
"""Server arguments that need no restart."""
