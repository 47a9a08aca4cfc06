"""Rows of the table `spans` (`schema.SPANS`): what became of a run of positions of one attempt of one request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_probe.engine.ledger.facts import ForwardPlan, Under
from sglang_probe.engine.ledger.lineage import Origin
from sglang_probe.errors import LedgerError
from sglang_probe.run import schema

Row = tuple[Any, ...]


def computed(
    rid: str, attempt: int, start: int, end: int, phase: str, forward: int, chunk: int, row: int, under: Under | None
) -> list[Row]:
    """Spans `[start, end)` that a forward pass computed, cut where the request's interventions began."""
    step = 1 if row >= 0 else 0
    pieces = [(start, end, None)] if under is None else under.cut(start, end)
    return [
        (
            *(rid, attempt, a, b, schema.COMPUTED, phase, forward, chunk, None),
            *(row + a - start if row >= 0 else -1, step, None, None, mark),
        )
        for a, b, mark in pieces
    ]


def reused(plan: ForwardPlan, i: int, covered: int, chunk: int, written_under: Mapping[str, Under]) -> list[Row]:
    """Spans `[covered, start)` of a prefill row, cut where the origin changes, and where the interventions began
    under which it wrote the entries."""
    rid, attempt, start = plan.rids[i], plan.attempts[i], plan.starts[i]
    origins = plan.origins.get(i)
    if not origins or origins[0].start != covered or origins[-1].end != start:
        raise LedgerError(f"{rid}: origins {origins} do not fill the reused positions {covered} to {start}")
    fate = (schema.REUSED, None, plan.forward_id, chunk, "device", -1, 0)
    spans = []
    for o in origins:
        under = None if o.rid is None else written_under.get(o.rid)
        for a, b, mark in [(o.start, o.end, None)] if under is None else under.cut(o.start, o.end):
            spans.append((rid, attempt, a, b, *fate, o.rid, attempt_of(o), mark))
    return spans


def attempt_of(origin: Origin) -> int | None:
    """The attempt that computed what is reused; None: unknown, as its request is."""
    return None if origin.rid is None else origin.attempt


def nowhere(rid: str, attempt: int, start: int, end: int, status: str) -> Row:
    """A span that no forward pass is recorded for."""
    forward, chunk, tier, row_start, row_step = -1, -1, None, -1, 0
    return (rid, attempt, start, end, status, None, forward, chunk, tier, row_start, row_step, None, None, None)
