"""Policies while SGLang runs: settings of the idle scheduler.

SGLang: `managers/scheduler.py` (`init_chunked_prefill`, `flush_cache`), `managers/schedule_policy.py`.
"""

from __future__ import annotations

from typing import Any

from sglang_probe.engine.hooks.supported import refuse_unsupported
from sglang_probe.errors import UnsupportedError
from sglang_probe.policy.switches import Switches


def started_with(scheduler: Any) -> Switches:
    """The switches as SGLang set them at its start."""
    from sglang.srt.runtime_context import get_schedule

    return Switches(
        radix_cache=not scheduler.tree_cache.disable,
        chunked_prefill_size=scheduler.chunked_prefill_size or -1,
        enable_mixed_chunk=bool(get_schedule().enable_mixed_chunk),
        schedule_policy=scheduler.policy.policy.value,
    )


def apply(scheduler: Any, wanted: Switches, start: Switches, *, used: bool = True) -> None:
    """Empty the cache, if the scheduler has been `used`, and set what `wanted` names; the rest is put back to `start`.
    The scheduler must be idle.

    Raises:
        UnsupportedError: requests are in flight, or the engine cannot do this without a restart.
    """
    to = start.model_copy(update=wanted.model_dump(exclude_none=True))
    assert to.chunked_prefill_size is not None
    if to.radix_cache and not start.radix_cache:
        raise UnsupportedError("the engine was started with `disable_radix_cache`, which cannot be undone")
    refuse_unsupported({"disable_radix_cache": not to.radix_cache})
    # A freshly built scheduler has nothing cached, and in some releases cannot say yet whether it is idle.
    if used and not scheduler.flush_cache(empty_cache=False):
        raise UnsupportedError("requests are in flight; the policy can be changed between runs only")
    if scheduler.tree_cache.disable == to.radix_cache:  # a cache that is none at all cannot be told
        scheduler.tree_cache.disable = not to.radix_cache
    chunk = to.chunked_prefill_size if to.chunked_prefill_size > 0 else None
    scheduler.chunked_prefill_size = chunk
    scheduler.is_mixed_chunk = chunk is not None and bool(to.enable_mixed_chunk)
    policy = scheduler.policy
    policy.policy = policy._validate_and_adjust_policy(to.schedule_policy, scheduler.tree_cache)
