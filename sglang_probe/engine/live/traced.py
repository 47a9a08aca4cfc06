"""What the ledger knows of one request, added up for an OpenTelemetry span: counts, ids, and no token.

The span ends while SGLang processes the result with which the request finishes, before the ledger commits it, so what
is still in flight is added then (`with_flight`). A step that is discarded (an overshoot) may end after the span, and is
in no count here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from sglang_probe.engine.ledger.facts import ForwardPlan
from sglang_probe.run import schema

_FIELDS = tuple(
    schema.SPANS.get_field_index(name)
    for name in ("attempt", "start", "end", "status", "phase", "forward_id", "origin_rid", "intervention")
)

_COUNTED = {
    schema.PREFILL: "computed",
    schema.RECOMPUTE: "recomputed",
    schema.DECODE: "decoded",
}
"""Of computed positions, the count by phase."""


@dataclass(slots=True)
class Traced:
    """Totals over the spans of one request, all its attempts together."""

    attempt: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("reused", *_COUNTED.values()), 0))
    origins: dict[str | None, int] = field(default_factory=dict)
    """Reused tokens by the request that computed them, in the order of positions; None: before the recording."""
    forwards: tuple[int, int] | None = None
    steering: str | None = None

    def add(self, span: tuple[Any, ...]) -> None:
        """Count a row of `schema.SPANS`."""
        self._add(*(span[i] for i in _FIELDS))

    def _add(
        self,
        attempt: int,
        start: int,
        end: int,
        status: str,
        phase: str | None,
        forward: int,
        origin: str | None,
        mark: str | None,
    ) -> None:
        if status == schema.REUSED:
            self.tokens["reused"] += end - start
            self.origins[origin] = self.origins.get(origin, 0) + end - start
        elif status == schema.COMPUTED and phase in _COUNTED:
            self.tokens[_COUNTED[phase]] += end - start
            self.steering = mark or self.steering
        else:
            return
        self.attempt = max(self.attempt, attempt)
        first, last = self.forwards or (forward, forward)
        self.forwards = (min(first, forward), max(last, forward))

    def with_flight(self, plans: Iterable[ForwardPlan], rid: str, *, finishing: bool) -> Traced:
        """These totals and what forward passes that are not committed yet add to them.

        Args:
            plans: launched and not committed, the oldest first.
            finishing: whether the result of the first is being processed, with which the request finishes; else it is
                dropped, and its steps in flight are discarded.
        """
        out = replace(self, tokens=dict(self.tokens), origins=dict(self.origins))
        for number, plan in enumerate(plans):
            if rid not in plan.rids:
                continue
            i = plan.rids.index(rid)
            attempt, forward, under = plan.attempts[i], plan.forward_id, plan.under.get(i)
            if plan.decoding[i]:
                if not finishing or number:
                    continue
                phase = schema.DECODE
            else:
                phase = schema.RECOMPUTE if attempt else schema.PREFILL
            for o in plan.origins.get(i, ()):
                out._add(attempt, o.start, o.end, schema.REUSED, None, forward, o.rid, None)
            pieces = (
                [(plan.starts[i], plan.ends[i], None)] if under is None else under.cut(plan.starts[i], plan.ends[i])
            )
            for start, end, mark in pieces:
                out._add(attempt, start, end, schema.COMPUTED, phase, forward, None, mark)
        return out

    def attributes(self) -> dict[str, int | str]:
        """By the names under which they are put on a span. What is not known is left out."""
        known = [rid for rid in self.origins if rid is not None]
        told: dict[str, int | str | None] = {
            "attempt": self.attempt,
            **{f"tokens.{name}": n for name, n in self.tokens.items()},
            "tokens.reused_from_before": self.origins.get(None, 0),
            "origins.count": len(known),
            "origins.first": known[0] if known else None,
            "forwards.first": self.forwards[0] if self.forwards else None,
            "forwards.last": self.forwards[1] if self.forwards else None,
            "steering": self.steering,
        }
        return {f"{PREFIX}.{name}": value for name, value in told.items() if value is not None}


PREFIX = "sglang_probe"
