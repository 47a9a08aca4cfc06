"""Policies while SGLang runs: settings of the idle scheduler, and requests that bypass the radix cache.

SGLang: `managers/scheduler.py` (`init_chunked_prefill`, `flush_cache`), `managers/schedule_policy.py`. A request says
`custom_params: {probe: {cache: read_only}}`, or `write_only`, or `off`; the hooks that honour it are the release's
(`Release.bypass_hooks`). One with a kept set (`instruments/kept_sets.py`) or with RoPE positions of its own
(`instruments/positions.py`) reads the cache up to where these begin to matter, and writes nothing.
"""

from __future__ import annotations

from typing import Any

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks.instruments import kept_sets as eviction
from sglang_probe.errors import ConfigError, UnsupportedError
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
    # One that was only just built has nothing to empty, and in some releases cannot say yet whether it is idle.
    if used and not scheduler.flush_cache(empty_cache=False):
        raise UnsupportedError("requests are in flight; the policy can be changed between runs only")
    if scheduler.tree_cache.disable == to.radix_cache:  # a cache that is none at all cannot be told
        scheduler.tree_cache.disable = not to.radix_cache
    chunk = to.chunked_prefill_size if to.chunked_prefill_size > 0 else None
    scheduler.chunked_prefill_size = chunk
    scheduler.is_mixed_chunk = chunk is not None and bool(to.enable_mixed_chunk)
    policy = scheduler.policy
    policy.policy = policy._validate_and_adjust_policy(to.schedule_policy, scheduler.tree_cache)


def read_limit(req: Any) -> int | None:
    """Positions that a request may reuse from the radix cache at most; None: as SGLang decides. For the release's own
    match hook."""
    if cache_use(req) in ("write_only", "off"):
        return 0
    return min((end for end in (eviction.cache_end(req), moves_from(req)) if end is not None), default=None)


def admit(req: Any) -> None:
    """A request was made: one that does not write the cache publishes nothing, and one whose kept set cannot be had is
    refused. For the release's own hook.

    One with a kept set or with RoPE positions of its own never writes: its entries are not those of its tokens at their
    places in a full cache.
    """
    eviction.refuse_misfits(req)
    private = eviction.requested(req) is not None or moves_from(req) is not None
    if private or cache_use(req) in ("read_only", "off"):
        req.skip_radix_cache_insert = True


def cache_use(req: Any) -> str | None:
    """How a request asked to use the cache."""
    params = req.sampling_params.custom_params
    probe = params.get("probe") if isinstance(params, dict) else None
    return probe.get("cache") if isinstance(probe, dict) else None


def moves_from(req: Any) -> int | None:
    """The first position whose rotation a request prescribes; 0 where that cannot be read, which is refused later."""
    try:
        override = Ask.of(req.sampling_params).positions
    except ConfigError:
        return 0
    return None if override is None else override.start
