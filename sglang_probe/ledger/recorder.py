"""The recorder: turns what the scheduler launches and commits into spans.

It runs on the scheduler thread and touches host integers only, never a tensor. Two facts make it exact.

*Launch.* Before a forward pass the scheduler's host lists say which positions it will compute. Positions below the
first one, if this attempt has not accounted for them yet, are being reused.

*Commit.* Results are processed in launch order, under overlap scheduling one step late. Only then is it known that a
request had finished before (SGLang then discards the output: `batch_result_processor.process_batch_result_decode`),
so spans are built at commit: such a row is an overshoot, its KV exists and its token does not.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sglang_probe.errors import LedgerError
from sglang_probe.ledger import schema


@dataclass(slots=True)
class ForwardPlan:
    """What one forward pass computes: per request, positions `[starts[i], ends[i])`, in batch order."""

    tag: int  # the scheduler's own number of this forward, to match launch and commit
    mode: str
    rids: list[str]
    starts: list[int]
    ends: list[int]
    decoding: list[bool]
    attempts: list[int]
    prompt_lens: list[int]
    waiting: int = 0
    launched: float = field(default_factory=time.time)
    forward_id: int = -1
    row_start: int = -1
    rows: dict[str, Any] | None = None
    discarded: set[str] = field(default_factory=set)  # requests that finished before this forward's commit

    @property
    def tokens(self) -> int:
        return sum(self.ends) - sum(self.starts)


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """What the engine says of a request when it finishes."""

    rid: str
    prompt_len: int
    output_len: int
    cached_tokens: int
    retractions: int
    finish_reason: str
    output_ids: list[int]


@dataclass(slots=True)
class Commit:
    """Facts ready to be written: rows of one forward pass, and spans and requests that closed with it."""

    forward: tuple[Any, ...] | None = None
    rows: dict[str, Any] | None = None
    spans: list[tuple[Any, ...]] = field(default_factory=list)
    requests: list[tuple[Any, ...]] = field(default_factory=list)


class Sink(Protocol):
    """Where commits go; it may block (back-pressure) but never raises for a full queue."""

    def put(self, commit: Commit) -> None: ...


@dataclass(slots=True)
class _Progress:
    """How far one attempt of one request is accounted for."""

    attempt: int
    covered: int = 0
    chunks: int = 0


class Recorder:
    """Builds the ledger of one engine process.

    Args:
        sink: receives finished facts in commit order.
        captures_rows: whether every launched forward will have rows attached.
        first_forward, first_row: numbering starts here (a resumed run continues its numbering).
    """

    def __init__(self, sink: Sink, *, captures_rows: bool, first_forward: int = 0, first_row: int = 0) -> None:
        self._sink = sink
        self._captures_rows = captures_rows
        self._next_forward = first_forward
        self._next_row = first_row
        self._pending: deque[ForwardPlan] = deque()
        self._progress: dict[str, _Progress] = {}

    def launch(self, plan: ForwardPlan) -> None:
        """Number a forward pass and its rows. Called before it runs."""
        plan.forward_id = self._next_forward
        self._next_forward += 1
        if self._captures_rows:
            plan.row_start = self._next_row
            self._next_row += plan.tokens
        self._pending.append(plan)

    def commit(self, tag: int, *, graph: bool, ended: Sequence[RequestEnd] = ()) -> None:
        """Account for the oldest launched forward, after the engine has processed its result.

        Args:
            tag: the scheduler's number of the forward, as given at launch.
            graph: whether it was replayed from a graph.
            ended: requests that finished with this result; what is in flight for them will be discarded.

        Raises:
            LedgerError: commits are out of launch order, or positions of a request do not follow each other.
        """
        if not self._pending or self._pending[0].tag != tag:
            expected = self._pending[0].tag if self._pending else "none"
            raise LedgerError(f"forward {tag} was committed out of launch order (expected {expected})")
        plan = self._pending.popleft()
        if self._captures_rows and plan.rows is None:
            raise LedgerError(f"forward {plan.forward_id} has no captured rows")
        commit = Commit(rows=plan.rows)
        offset = 0
        for i in range(len(plan.rids)):
            self._account(plan, i, offset, commit.spans)
            offset += plan.ends[i] - plan.starts[i]
        for end in ended:
            for later in self._pending:
                if end.rid in later.rids:
                    later.discarded.add(end.rid)
            self._close(end, commit)
        decode = sum(plan.decoding)
        commit.forward = (
            plan.forward_id,
            plan.mode,
            len(plan.rids),
            plan.tokens - decode,
            decode,
            graph,
            plan.launched,
            time.time() - plan.launched,
            plan.waiting,
            plan.row_start,
        )
        self._sink.put(commit)

    def drain(self) -> None:
        """Account for what is still in flight when the recording closes."""
        while self._pending:
            self.commit(self._pending[0].tag, graph=False)

    def _account(self, plan: ForwardPlan, i: int, offset: int, spans: list[tuple[Any, ...]]) -> None:
        rid, start, end = plan.rids[i], plan.starts[i], plan.ends[i]
        row = plan.row_start + offset if plan.row_start >= 0 else -1
        if rid in plan.discarded:
            phase = schema.OVERSHOOT if plan.decoding[i] else schema.PREFILL
            spans.append(_computed(rid, plan.attempts[i], start, end, phase, plan.forward_id, -1, row))
            return
        p = self._progress.get(rid)
        if p is None or p.attempt != plan.attempts[i]:
            p = self._progress[rid] = _Progress(plan.attempts[i])
        if start < p.covered:
            raise LedgerError(f"{rid}: position {start} launched again in attempt {p.attempt}; {p.covered} accounted")
        if plan.decoding[i]:
            if start != p.covered:
                raise LedgerError(f"{rid}: decode of position {start}, but {p.covered} positions are accounted for")
            spans.append(_computed(rid, p.attempt, start, end, schema.DECODE, plan.forward_id, -1, row))
        else:
            if start > p.covered:
                forward = plan.forward_id
                spans.append(
                    (rid, p.attempt, p.covered, start, schema.REUSED, None, forward, p.chunks, "device", -1, 0)
                )
            phase = schema.RECOMPUTE if p.attempt else schema.PREFILL
            spans.append(_computed(rid, p.attempt, start, end, phase, plan.forward_id, p.chunks, row))
            p.chunks += 1
        p.covered = end

    def _close(self, end: RequestEnd, commit: Commit) -> None:
        p = self._progress.pop(end.rid, None)
        covered = p.covered if p else 0
        if covered < end.prompt_len:  # aborted before its prompt was done
            attempt = p.attempt if p else 0
            commit.spans.append(
                (end.rid, attempt, covered, end.prompt_len, schema.UNREQUESTED, None, -1, -1, None, -1, 0)
            )
        commit.requests.append(
            (
                end.rid,
                end.prompt_len,
                end.output_len,
                end.cached_tokens,
                end.retractions,
                end.finish_reason,
                end.output_ids,
            )
        )


def _computed(
    rid: str, attempt: int, start: int, end: int, phase: str, forward: int, chunk: int, row: int
) -> tuple[Any, ...]:
    return (rid, attempt, start, end, schema.COMPUTED, phase, forward, chunk, None, row, 1 if row >= 0 else 0)
