"""A live server: what the scheduler process reports, and per-request provenance.

SGLang: `managers/scheduler.py` (`run_event_loop`); where the internal state is read and an answer is built is the
release's to say (`Release.live_hooks`). The HTTP side is `engine/hooks/http.py`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks import guard, inventory
from sglang_probe.engine.hooks.instruments.base import Instrument
from sglang_probe.engine.platform.environment import platform_facts
from sglang_probe.engine.releases.base import Hook, Release
from sglang_probe.run.hook_points import engine_module

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.config import EngineProbeConfig
    from sglang_probe.engine.ledger.recorder import ForwardPlan, RequestEnd
    from sglang_probe.engine.live.metrics import Metrics
    from sglang_probe.engine.live.provenance import Span
    from sglang_probe.engine.live.recording import LiveRecording

logger = logging.getLogger("sglang_probe")

STATE_KEY = "probe"
"""Entry in the scheduler's internal state (and so in `/server_info`)."""

META_KEY = "probe"
"""Entry in `meta_info` of a request that asked for its provenance."""

_ARGUMENTS = (
    # Those that decide what is computed and reused. Never all of them: they hold the server's keys.
    "model_path",
    "served_model_name",
    "dtype",
    "device",
    "attention_backend",
    "page_size",
    "chunked_prefill_size",
    "enable_mixed_chunk",
    "disable_radix_cache",
    "disable_overlap_schedule",
    "radix_eviction_policy",
    "schedule_policy",
    "max_total_tokens",
    "max_running_requests",
    "tp_size",
    "dp_size",
    "random_seed",
)


class LiveServer(Instrument):
    """A live server is recorded in segments; a request may ask for its provenance."""

    name = "live"
    field = "provenance"
    features = ("live",)

    @classmethod
    def wanted(cls, config: EngineProbeConfig) -> bool:
        return config.live is not None

    @classmethod
    def hooks(cls, release: Release) -> list[Hook]:
        loop = "sglang.srt.managers.scheduler.Scheduler.run_event_loop"
        return [*release.live_hooks(), (loop, run_event_loop, "AROUND")]

    @classmethod
    def serves(cls, started: EngineProbeConfig, asked: EngineProbeConfig) -> bool:
        return started.live is None and asked.live is None  # segments follow each other; a recording never ends

    def launch(self, reqs: Sequence[Any], asks: Sequence[Ask], plan: ForwardPlan) -> None:
        live = guard.active().live
        if live is not None:
            rows = zip(asks, plan.rids, plan.contexts, strict=True)
            live.launched(plan, {rid for ask, rid, context in rows if ask.provenance and context is not None})


def start(config: EngineProbeConfig, server_args: Any, dp_rank: int) -> LiveRecording:
    """Begin to record. Called once the scheduler is built.

    Data-parallel ranks are servers of their own with one address: rank n of several records into `dp<n>`.

    Raises:
        RunDirectoryError: another server records into the same directory.
    """
    from sglang_probe.engine.live.recording import LiveRecording

    assert config.live is not None
    several = server_args.dp_size > 1
    reviewed = inventory.load_inventory()
    facts = {
        "kind": "live",
        "arm": "live",
        "model": {"name": server_args.model_path},
        "model_path": server_args.model_path,
        "dtype": server_args.dtype,
        "hook_points": {name: engine_module(name) for name in config.hook_points},
        "telemetry": None if config.telemetry is None else config.telemetry.model_dump(mode="json"),
        "rows_kept": config.rows.model_dump(mode="json"),
        **guard.active().facts(),
        "server_resolved": {name: getattr(server_args, name, None) for name in _ARGUMENTS},
        "platform": platform_facts(),
        "inventory": {"sglang": reviewed.sglang, "version": reviewed.version},
        "privacy": config.live.privacy,
        "rows_dropped": 0,
    }
    drops = config.live.when_full == "drop" or (config.live.when_full is None and not config.hook_points)
    return LiveRecording(
        config.run.resolve() / f"dp{dp_rank}" if several else config.run.resolve(),
        config.live,
        {**facts, "dp_rank": dp_rank},
        part_seconds=config.checkpoint_seconds,
        drops=drops,
        metrics=_metrics(server_args, dp_rank if several else None),
    )


def name_of(rid: str) -> str:
    """The name of a running request in the ledger. Runs inside guarded code."""
    live = guard.active().live
    return rid if live is None else live.names.get(rid)


def ending(reqs: Sequence[Any], ends: Sequence[RequestEnd]) -> list[RequestEnd]:
    """These requests are about to end; returns `ends` under their names. Runs inside guarded code."""
    live = guard.active().live
    if live is None:
        return list(ends)
    named_ends = [replace(end, rid=live.names.end(end.rid)) for end in ends]
    for r, end in zip(reqs, named_ends, strict=True):
        # Of a prompt given as embeddings SGLang's token ids are made up.
        live.ending(end.rid, r.origin_input_ids if r.input_embeds is None else None)
    return named_ends


def get_internal_state(result: Any, _controller: Any, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `get_internal_state`: add what the endpoints show."""
    with contextlib.suppress(Exception):  # a readback is no reason to stop a recording
        result.internal_state[STATE_KEY] = state()


def state() -> dict[str, Any]:
    """Whether this process is being recorded, or why not, and the counts."""
    session = guard.session
    if session is None or session.live is None:
        return {"recording": False, "reason": "the recording was not started"}
    reason = session.fault if session.recorder is None else None
    return {"recording": session.recorder is not None, "reason": reason, **session.live.status()}


def run_event_loop(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `Scheduler.run_event_loop`: it returns once the server was told to end and requests have drained."""
    try:
        return original(scheduler, *args, **kwargs)
    finally:
        _closed()


def anybody_asks() -> bool:
    """Whether a request in flight asked for its provenance."""
    session = guard.session
    return session is not None and session.live is not None and session.live.totals.asking > 0


@guard.guarded
def provenance_of(rids: Sequence[str], finished: Sequence[bool]) -> list[list[Span]] | None:
    """Spans of the requests that finish now and asked; None if none does, so that nobody's `meta_info` changes."""
    live = guard.active().live
    assert live is not None
    spans = [live.provenance(rid) or [] if done else [] for rid, done in zip(rids, finished, strict=True)]
    return spans if any(spans) else None


@guard.guarded
def _closed() -> None:
    session = guard.active()
    session.close()
    session.recorder = None


def _metrics(server_args: Any, dp_rank: int | None) -> Metrics | None:
    if not server_args.enable_metrics:
        return None
    from sglang_probe.engine.live.metrics import Metrics

    try:
        return Metrics(server_args.served_model_name or server_args.model_path, dp_rank)
    except Exception:
        logger.exception("sglang-probe has no Prometheus series")
        return None
