"""The ledger's facts of a request on SGLang's own OpenTelemetry span of it (`live: {traces: true}`).

SGLang gives each request that it traces a span of the scheduler, under the request's root span, and ends it where the
request finishes or is dropped (`observability/trace.py`, `TraceReqContext.abort`). Just before, the totals that the
live recording kept of the request are put on it. They are integers and ids that are there anyway: nothing is looked up,
waited for or written. SGLang exports its spans in a thread of its own, as without us.

A fault here costs the attributes and nothing else: neither a request nor the recording.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.base import Instrument
from sglang_probe.engine.releases.base import Hook, Release
from sglang_probe.errors import UnsupportedError

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.config import EngineProbeConfig
    from sglang_probe.engine.ledger.facts import ForwardPlan

logger = logging.getLogger("sglang_probe")

_NAME = "_sglang_probe_name"
"""Attribute of a `TraceReqContext`: the epoch of the recording that follows the request, and its name there."""

_failures = itertools.count()


class Traces(Instrument):
    """See the module."""

    name = "traces"
    features = ("traces",)

    @classmethod
    def wanted(cls, config: EngineProbeConfig) -> bool:
        return config.live is not None and config.live.traces

    @classmethod
    def hooks(cls, release: Release) -> list[Hook]:
        return release.trace_hooks()

    def open(self, config: EngineProbeConfig, scheduler: Any) -> None:
        from sglang.srt.observability.trace import get_global_tracing_enabled

        super().open(config, scheduler)
        if not get_global_tracing_enabled():
            raise UnsupportedError(
                "`live: {traces: true}` puts attributes on SGLang's spans, and this server makes none",
                fix="start it with `--enable-trace --otlp-traces-endpoint HOST:PORT`, or leave `traces` out",
            )

    def launch(self, reqs: Sequence[Any], asks: Sequence[Ask], plan: ForwardPlan) -> None:
        if plan.mode == "decode":
            return
        try:  # this is guarded code, in which a fault would stop the recording
            epoch = guard.active().epoch
            for req, name, context in zip(reqs, plan.rids, plan.contexts, strict=True):
                if context is not None and (span := req.time_stats.trace_ctx).tracing_enable:
                    setattr(span, _NAME, (epoch, name))
        except Exception:
            _failed()


def span_ends(span: Any, ts: int | None = None, abort_info: Any = None) -> None:
    """BEFORE `TraceReqContext.abort`: the span of the scheduler is about to end, with `abort_info` if its request is
    dropped outside a forward's result."""
    known = span.__dict__.pop(_NAME, None)
    if known is None:
        return
    try:
        session, (epoch, name) = guard.session, known
        if session is None or session.recorder is None or session.live is None or session.epoch != epoch:
            return
        told = session.live.traced(name, finishing=abort_info is None)
        if told is not None:
            span.trace_set_thread_attrs(told)
    except Exception:
        _failed()


def _failed() -> None:
    if next(_failures) == 0:  # an SDK that fails does so for every request
        logger.exception("sglang-probe could not put attributes on a span; this is said once")
