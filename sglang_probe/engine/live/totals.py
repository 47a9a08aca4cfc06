"""Running totals of a live recording: plain integers, added up as facts are committed. No frame is ever built."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from sglang_probe.engine.ledger.facts import Commit, ForwardPlan
from sglang_probe.engine.live import provenance
from sglang_probe.engine.live.traced import Traced
from sglang_probe.run import schema

_RID, _ATTEMPT, _START, _END, _STATUS, _PHASE = (
    schema.SPANS.get_field_index(name) for name in ("rid", "attempt", "start", "end", "status", "phase")
)
_EVENT, _TOKENS = schema.TREE.get_field_index("event"), schema.TREE.get_field_index("tokens")
_REQUEST_RID = schema.ENGINE_REQUESTS.get_field_index("rid")
_FINISH = schema.ENGINE_REQUESTS.get_field_index("finish_reason")

CLASSES = ("computed", "reused", schema.DECODE, schema.OVERSHOOT, schema.RECOMPUTE, schema.UNREQUESTED, schema.DROPPED)
"""Fates of positions. `computed` and `reused` are of prompts; `recompute` is what a retraction made necessary."""

_REMEMBERED = 1024
"""Ended requests to remember at least: a discarded step of theirs may still commit."""


@dataclass(slots=True)
class Entry:
    """One request: how far it is accounted for, and what became of its positions."""

    prompt_len: int
    attempt: int = 0
    covered: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    spans: list[provenance.Span] | None = None  # kept only for a request that asked for its provenance
    traced: Traced | None = None  # kept only where spans get attributes, of requests known from their beginning
    finish: str | None = None
    ended: float = 0.0  # unix seconds

    def row(self, rid: str) -> dict[str, Any]:
        """For `GET /probe/coverage`."""
        return {"rid": rid, "prompt": self.prompt_len, **self.counts, "finish": self.finish, "ended": self.ended}


class Totals:
    """Counts over everything recorded by this process, and the requests in flight.

    Args:
        recent: ended requests to list.
        traces: whether OpenTelemetry spans get what is known of their requests.
    """

    def __init__(self, recent: int, *, traces: bool = False) -> None:
        self.positions = dict.fromkeys(CLASSES, 0)
        self.requests = 0
        self.unaccounted = 0
        """Requests that could not be accounted for."""
        self.forwards = 0
        self.rows = 0
        self.evicted = 0
        """KV slots that the prefix cache had to give up."""
        self.active: dict[str, Entry] = {}
        self.asking = 0
        """Active requests that asked for their provenance."""
        self.pending: deque[ForwardPlan] = deque()
        """Launched and not yet committed."""
        self._recent = recent
        self._traces = traces
        self._ended: dict[str, Entry] = {}

    def launch(self, plan: ForwardPlan, asking: set[str]) -> None:
        """A forward pass was launched; `asking` are its requests that want their provenance."""
        self.pending.append(plan)
        for i, context in enumerate(plan.contexts):
            rid = plan.rids[i]
            if (context is not None or rid in plan.carried) and rid not in self.active:
                spans: list[provenance.Span] | None = [] if rid in asking else None
                self.asking += spans is not None
                attempt, covered = plan.carried.get(rid, (0, 0))
                traced = Traced() if self._traces and rid not in plan.carried else None
                self.active[rid] = Entry(plan.prompt_lens[i], attempt, covered, spans=spans, traced=traced)

    def count(self, commit: Commit) -> None:
        """Add a commit."""
        if commit.forward is not None:
            self.forwards += 1
            if self.pending:
                self.pending.popleft()
        self.rows += commit.numbered
        self.evicted += sum(event[_TOKENS] for event in commit.tree if event[_EVENT] == schema.EVICTED)
        for span in commit.spans:
            n = span[_END] - span[_START]
            fate = _fate(span[_STATUS], span[_PHASE])
            self.positions[fate] += n
            rid = span[_RID]
            entry = self.active.get(rid) or self._ended.get(rid)
            if entry is None:
                continue  # dropped from the queue before it ran
            entry.counts[fate] = entry.counts.get(fate, 0) + n
            if span[_STATUS] != schema.UNREQUESTED:
                entry.attempt, entry.covered = span[_ATTEMPT], span[_END]
            if entry.spans is not None:
                provenance.extend(entry.spans, span)
            if entry.traced is not None:
                entry.traced.add(span)
        for request in commit.requests:
            self._end(request)

    def traced(self, rid: str) -> Traced | None:
        """Of a request in flight, or that ended lately; None: not known, or not from its beginning."""
        entry = self.active.get(rid) or self._ended.get(rid)
        return None if entry is None else entry.traced

    def dropped(self, commit: Commit) -> None:
        """A commit that was counted could not be written."""
        for span in commit.spans:
            n = span[_END] - span[_START]
            self.positions[_fate(span[_STATUS], span[_PHASE])] -= n
            self.positions[schema.DROPPED] += n

    def forget_in_flight(self) -> None:
        """The recording has stopped, and what was in flight is not followed any more."""
        self.active.clear()
        self.pending.clear()
        self.asking = 0

    def carried(self) -> dict[str, list[int]]:
        """`rid: [attempt, position]` of every request that has positions from before this moment and may get more:
        those in flight, and ended ones of which a discarded step is still running."""
        out = {rid: [e.attempt, e.covered] for rid, e in self.active.items() if e.covered}
        for plan in self.pending:
            for rid in plan.rids:
                if rid not in out and rid not in self.active and rid in self._ended:
                    out[rid] = [self._ended[rid].attempt, self._ended[rid].covered]
        return out

    def recent(self) -> list[dict[str, Any]]:
        """The last ended requests, latest first."""
        latest = list(self._ended.items())[-self._recent :] if self._recent else []
        return [entry.row(rid) for rid, entry in reversed(latest)]

    def _end(self, request: tuple[Any, ...]) -> None:
        self.requests += 1
        self.unaccounted += request[_FINISH] == schema.UNACCOUNTED
        rid = request[_REQUEST_RID]
        entry = self.active.pop(rid, None) or Entry(request[schema.ENGINE_REQUESTS.get_field_index("prompt_len")])
        entry.finish, entry.ended = request[_FINISH], time.time()
        if entry.spans is not None:
            self.asking -= 1
            entry.spans = None
        self._ended[rid] = entry
        while len(self._ended) > max(self._recent, _REMEMBERED):
            del self._ended[next(iter(self._ended))]


def _fate(status: str, phase: str | None) -> str:
    if status == schema.COMPUTED:
        return "computed" if phase == schema.PREFILL or phase is None else phase
    return status
