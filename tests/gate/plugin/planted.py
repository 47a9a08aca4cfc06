"""A second SGLang plugin, for tests: a server that reuses wrongly while a file says so.

The file that `PLANTED_WRONG_SLOTS` names holds `SLOTS SHARE`: in that share of the reusing requests so many positions
of the cached prefix get the KV slots of other positions of it. `SLOTS SHARE cancelled` does so only to the next
requests that reuse something after a client went away. `entry SHARE NUMBER` spoils one cached entry for good, once for
each number: of the next request that reuses something, one position's keys and values in all layers become a mixture,
by this share, with those of another position of its prefix. Without the file the server is as it always is.
Loaded through `PYTHONPATH`, without being installed.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

AFTER_A_CANCEL = 2
"""Requests that go wrong after a cancelled one."""


def register() -> None:
    named = os.environ.get("PLANTED_WRONG_SLOTS")
    if not named or "sglang.srt.managers.scheduler" not in sys.modules:
        return
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    right, cancel = UnifiedRadixCache.prefix_device_indices, Scheduler.abort_request
    rng = random.Random(0)
    left, spoiled = [0], list[list[str]]()

    def spoil(tree: Any, slot: int, other: int, share: float) -> None:
        pool = tree.token_to_kv_pool_allocator.get_kvcache()
        for buffer in (*pool.k_buffer, *pool.v_buffer):
            buffer[slot] = (1 - share) * buffer[slot] + share * buffer[other]

    def cancelled(self: Any, told: Any) -> Any:
        left[0] = AFTER_A_CANCEL
        return cancel(self, told)

    def planted(self: Any, req: Any) -> Any:
        slots = right(self, req)
        n = len(slots)
        try:
            wrong, share, *only = Path(named).read_text().split()
        except (OSError, ValueError):
            return slots
        if wrong == "entry":
            if n > 32 and only not in spoiled:
                spoiled.append(only)
                at = rng.randrange(1, n)
                spoil(self, int(slots[at]), int(slots[(at + n // 2) % n]), float(share))
            return slots
        if n > 32 and (not only or left[0] > 0) and rng.random() < float(share):
            left[0] -= 1
            slots = slots.clone()
            at = rng.sample(range(1, n), int(wrong))
            slots[at] = slots[[(i + n // 2) % n for i in at]]
        return slots

    UnifiedRadixCache.prefix_device_indices = planted
    Scheduler.abort_request = cancelled
