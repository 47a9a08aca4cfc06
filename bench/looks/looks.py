"""A second SGLang plugin, for `bench/replay.py looks`: writes down every time that the tree is asked for a request.

The ledger keeps the last time before a request is launched. SGLang asks at each step for each request that waits, and
an eviction policy that counts hits, or goes by the last use, sees these, too. Where the queue is served in an order
that does not depend on the cache, and eviction is LRU, SGLang does not ask, but renews the use of what waiting requests
would get, every few steps, the head of the queue last (`SchedulePolicy._touch_waiting_prefixes`).
"""

from __future__ import annotations

import os
import sys
from typing import Any


def register() -> None:
    named = os.environ.get("LOOKS_FILE")
    if not named or "sglang.srt.managers.scheduler" not in sys.modules:
        return
    from sglang_probe.engine.hooks import guard, tree

    right = tree._matched
    out = open(named, "a", buffering=1)  # noqa: SIM115 - as long as the process lives

    def matched(req: Any, cache: Any, max_prefix_len: int | None) -> None:
        right(req, cache, max_prefix_len)
        found = getattr(req, tree.MATCHED, None)
        if found is not None:
            limit = len(req.origin_input_ids) + len(req.output_ids) if max_prefix_len is None else max_prefix_len
            out.write(f"{found[0][1]} {req.rid} {limit} asked\n")

    tree._matched = matched

    from sglang.srt.managers import schedule_policy

    touch = schedule_policy.touch_waiting_prefix

    def touched(req: Any, cache: Any) -> None:
        touch(req, cache)
        session = guard.session
        if session is not None and session.recorder is not None:
            _, order = session.recorder.asked()
            out.write(f"{order} {req.rid} {len(req.origin_input_ids) + len(req.output_ids)} touched\n")

    schedule_policy.touch_waiting_prefix = touched
