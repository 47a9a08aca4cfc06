"""Policies while SGLang runs: settings of the idle scheduler, and requests that bypass the radix cache.

SGLang: `managers/scheduler.py` (`init_chunked_prefill`, `flush_cache`), `managers/schedule_policy.py`,
`mem_cache/common.py` (`match_kv_cache`). A request says `custom_params: {probe: {cache: read_only}}`, or `write_only`,
or `off`; one with a kept set (`hooks/eviction.py`) reads the cache up to the end of its set and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_probe.errors import UnsupportedError
from sglang_probe.hooks import eviction
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


def apply(scheduler: Any, wanted: Switches, start: Switches) -> None:
    """Empty the cache and set what `wanted` names; the rest is put back to `start`. The scheduler must be idle.

    Raises:
        UnsupportedError: requests are in flight, or the engine cannot do this without a restart.
    """
    to = start.model_copy(update=wanted.model_dump(exclude_none=True))
    assert to.chunked_prefill_size is not None
    if to.radix_cache and not start.radix_cache:
        raise UnsupportedError("the engine was started with `disable_radix_cache`, which cannot be undone")
    if not scheduler.flush_cache(empty_cache=False):
        raise UnsupportedError("requests are in flight; the policy can be changed between runs only")
    scheduler.tree_cache.disable = not to.radix_cache
    chunk = to.chunked_prefill_size if to.chunked_prefill_size > 0 else None
    scheduler.chunked_prefill_size = chunk
    scheduler.is_mixed_chunk = chunk is not None and bool(to.enable_mixed_chunk)
    policy = scheduler.policy
    policy.policy = policy._validate_and_adjust_policy(to.schedule_policy, scheduler.tree_cache)


def match_kv_cache(original: Callable[..., Any], req: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `match_kv_cache`: a request that does not read the cache matches nothing, one with a kept set no more
    than what it is about."""
    if cache_use(req) in ("write_only", "off"):
        kwargs["max_prefix_len"] = 0
    elif (end := eviction.cache_end(req)) is not None:
        given = kwargs.get("max_prefix_len")
        kwargs["max_prefix_len"] = end if given is None else min(end, given)
    return original(req, *args, **kwargs)


def create_generation_req(req: Any, _scheduler: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `Scheduler._create_generation_req`: a request that does not write the cache publishes nothing, whether it
    asked for that or for a kept set; and one whose kept set cannot be had is refused."""
    eviction.refuse_misfits(req)
    if cache_use(req) in ("read_only", "off") or eviction.requested(req) is not None:
        req.skip_radix_cache_insert = True


def cache_use(req: Any) -> str | None:
    """How a request asked to use the cache."""
    params = req.sampling_params.custom_params
    probe = params.get("probe") if isinstance(params, dict) else None
    return probe.get("cache") if isinstance(probe, dict) else None
