"""The spans of one request, as `meta_info` returns them to the client who asked."""

from __future__ import annotations

from typing import Any

from sglang_probe.engine.ledger.facts import ForwardPlan
from sglang_probe.run import schema

_AT = {name: schema.SPANS.get_field_index(name) for name in schema.SPANS.names}

Span = dict[str, Any]
"""attempt, start, end, status, phase, forward, and origin: the request that computed a reused span (null: computed
before the recording)."""


def extend(spans: list[Span], fact: tuple[Any, ...]) -> None:
    """Add a span of the ledger, joined with the one before if it only continues it."""
    span = {
        "attempt": fact[_AT["attempt"]],
        "start": fact[_AT["start"]],
        "end": fact[_AT["end"]],
        "status": fact[_AT["status"]],
        "phase": fact[_AT["phase"]],
        "forward": fact[_AT["forward_id"]],
        "origin": fact[_AT["origin_rid"]],
    }
    last = spans[-1] if spans else None
    if (
        last is not None
        and span["phase"] in schema.STEP_PHASES
        and last["end"] == span["start"]
        and all(last[k] == span[k] for k in ("attempt", "status", "phase"))
    ):
        last["end"] = span["end"]
    else:
        spans.append(span)


def with_current(spans: list[Span], plan: ForwardPlan | None, rid: str) -> list[Span]:
    """`spans` and what the forward pass whose result is being processed adds to them.

    SGLang sends a finished request's output while it processes the result, before the ledger commits that forward.
    """
    out = [dict(s) for s in spans]
    if plan is None or rid not in plan.rids:
        return out
    i = plan.rids.index(rid)
    attempt, forward = plan.attempts[i], plan.forward_id
    out += [_span(attempt, o.start, o.end, schema.REUSED, None, forward, o.rid) for o in plan.origins.get(i, ())]
    phase = schema.DECODE if plan.decoding[i] else schema.RECOMPUTE if attempt else schema.PREFILL
    last = out[-1] if out else None
    if phase == schema.DECODE and last and last["phase"] == phase and last["end"] == plan.starts[i]:
        last["end"] = plan.ends[i]
    else:
        out.append(_span(attempt, plan.starts[i], plan.ends[i], schema.COMPUTED, phase, forward, None))
    return out


def _span(attempt: int, start: int, end: int, status: str, phase: str | None, forward: int, origin: str | None) -> Span:
    return {
        "attempt": attempt,
        "start": start,
        "end": end,
        "status": status,
        "phase": phase,
        "forward": forward,
        "origin": origin,
    }
