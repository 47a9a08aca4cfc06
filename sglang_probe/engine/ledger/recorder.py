"""The recorder: turns what the scheduler launches and commits into spans.

It runs on the scheduler thread and touches host integers only, never a tensor. Two facts make it exact.

*Launch.* Before a forward pass the scheduler's host lists say which positions it will compute. Positions below the
first one, if this attempt has not accounted for them yet, are being reused.

*Commit.* Results are processed in launch order, under overlap scheduling one step late. Only then is it known that a
request had finished before (SGLang then discards the output: `batch_result_processor.process_batch_result_decode`),
so spans are built at commit: such a row is an overshoot, its KV exists and its token does not.

What a forward pass does for a request that does not follow from what came before is a `LedgerError`. A harvest ends
with it. A live recording (`tolerant`) gives up that one request: its positions are `dropped` from there on, its rows
are not written, it ends as `unaccounted`, and everybody else is recorded as ever.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from sglang_probe.engine.ledger import spans
from sglang_probe.engine.ledger.clock import now
from sglang_probe.engine.ledger.facts import Commit, Context, ForwardPlan, RequestEnd, Sink, Under, cut
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.tree_events import TreeEvents
from sglang_probe.errors import LedgerError
from sglang_probe.run import schema

logger = logging.getLogger("sglang_probe")


@dataclass(slots=True)
class _Progress:
    """How far one attempt of one request is accounted for, and how far it is launched."""

    attempt: int
    covered: int = 0
    launched: int = 0
    chunks: int = 0


class Recorder:
    """Builds the ledger of one engine process.

    Args:
        sink: receives finished facts in commit order.
        lineage: follows who computed what is reused; None if the engine cannot reuse.
        captures_rows: whether every launched forward will have rows attached.
        first_forward, first_row: numbering starts here (a resumed run continues its numbering).
        tolerant: give up a request whose forwards do not fit, and record the others; else that is an error.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        lineage: Lineage | None,
        captures_rows: bool,
        first_forward: int = 0,
        first_row: int = 0,
        tolerant: bool = False,
        sliding: bool = False,
    ) -> None:
        self._sink = sink
        self.lineage = lineage
        self._captures_rows = captures_rows
        self._next_forward = first_forward
        self._next_row = first_row
        self._pending: deque[ForwardPlan] = deque()
        self._progress: dict[str, _Progress] = {}
        self._rebinds: list[tuple[Any, ...]] = []
        self._tree = TreeEvents(first_forward, sliding=sliding)
        self._ended: list[RequestEnd] = []
        self._gone: list[str] = []
        self._under: dict[str, Under] = {}
        """Interventions of every request whose entries may still be reused."""
        self._under_limit = _UNDER
        self._tolerant = tolerant
        self._lost: set[str] = set()
        self._newly_lost: list[tuple[str, str]] = []

    def launch(self, plan: ForwardPlan) -> None:
        """Number a forward pass, and look up the origins of what it reuses. Called before it runs.

        Raises:
            LedgerError: what a request reuses cannot be looked up; of a tolerant recording only that request is lost.
        """
        plan.forward_id = self._next_forward
        self._next_forward += 1
        for i, context in enumerate(plan.contexts):
            p = self._progress.get(plan.rids[i])
            if context is None and p is not None and p.attempt == plan.attempts[i]:
                p.launched = plan.ends[i]
                continue
            try:
                self._launch(plan, i)
            except Exception as e:
                if not self._tolerant:
                    raise
                self._lose(plan.rids[i], str(e))
        if plan.unaccounted is not None:
            for rid in plan.rids:
                self._lose(rid, plan.unaccounted)
        self._pending.append(plan)

    def _launch(self, plan: ForwardPlan, i: int) -> None:
        rid, attempt, context, start = plan.rids[i], plan.attempts[i], plan.contexts[i], plan.starts[i]
        p = self._progress.get(rid)
        if p is None and rid in plan.began_before:
            p = self._progress[rid] = _Progress(attempt, covered=start)
            plan.carried[rid] = (attempt, start)
            if self.lineage is not None:
                self.lineage.adopt(rid, attempt, start)
        elif p is None or p.attempt != attempt:
            p = self._progress[rid] = _Progress(attempt)
            if context is not None:
                plan.matched.append(self._tree.match(plan, i, context))
        if context is not None and self.lineage is not None and rid not in self._lost:
            origins = self.lineage.launch(rid, attempt, start, plan.ends[i], context.tokens, context.namespace)
            if origins:
                plan.origins[i] = origins
        p.launched = plan.ends[i]

    def _lose(self, rid: str, reason: str) -> None:
        """Give up a request. What it has in the cache is of no known owner from now on."""
        if rid in self._lost:
            return
        self._lost.add(rid)
        self._newly_lost.append((rid, reason))
        logger.warning("sglang-probe cannot account for request %.200s, and records the others: %.500s", rid, reason)
        if self.lineage is not None:
            self.lineage.end(rid)

    def asked(self) -> tuple[TreeEvents, int]:
        """The tree is asked for a request's prefix (`TreeEvents.asked`)."""
        return self._tree.asked()

    def evicted(self, tokens: int) -> None:
        """The tree lost entries in so many slots, for what the next forward needs."""
        self._tree.evicted(self._next_forward, tokens)

    def flushed(self) -> None:
        """The tree lost everything."""
        self._tree.flushed(self._next_forward)
        if self.lineage is not None:
            self.lineage.forget_tree()

    def knows(self, rid: str) -> bool:
        """Whether a request was launched in this recording and is not over."""
        return rid in self._progress

    def publish(
        self,
        rid: str,
        attempt: int,
        context: Context,
        length: int,
        first_new: int,
        protected: int,
        taken: Sequence[tuple[int, int]] = (),
    ) -> None:
        """The tree took a request's entries and perhaps repointed some (`Lineage.publish`).

        The row is rewritten on the device after the forwards already launched, so the next one is the first to see it.
        """
        if self.lineage is None:
            return
        entries = (context.tokens, length, first_new, protected, context.namespace, taken)
        try:
            rebound = self.lineage.publish(rid, *entries)
        except LedgerError as e:
            if not self._tolerant:
                raise
            self._lose(rid, e.message)
            rebound = self.lineage.publish(rid, *entries)  # of an unknown owner now
        for start, stop in (*taken, (first_new, length)):
            self._tree.published(self._next_forward, rid, attempt, context, start, stop)
        for o in rebound:
            self._rebinds.append((rid, attempt, o.start, o.end, self._next_forward, o.rid, spans.attempt_of(o)))

    def end(self, end: RequestEnd) -> None:
        """Note a finished or aborted request; what is in flight for it will be discarded.

        Call it after `commit` of the forward with which it finished.
        """
        for plan in self._pending:
            if end.rid in plan.rids:
                plan.discarded.add(end.rid)
        self._ended.append(end)
        if self.lineage is not None:
            self.lineage.end(end.rid)

    def abort(self, end: RequestEnd) -> None:
        """Note a request that was dropped outside a forward's result. On an idle engine no commit would follow."""
        self.end(end)
        if not self._pending:
            self._put_ended()

    def commit(
        self, tag: int, *, graph: bool, ended: Sequence[RequestEnd] = (), retracted: Collection[str] = ()
    ) -> None:
        """Account for the oldest launched forward, after the engine has processed its result.

        Args:
            tag: the scheduler's number of the forward, as given at launch.
            graph: whether it was replayed from a graph.
            ended: requests that finished with this result.
            retracted: requests that were retracted while it was in flight: their output was discarded too.

        Raises:
            LedgerError: commits are out of launch order, or positions of a request do not follow each other.
        """
        if self._tolerant and (not self._pending or tag < self._pending[0].tag):
            # Launched before this recording began. What was launched since of a request that ends is discarded.
            for end in ended:
                if self.knows(end.rid):
                    self.end(end)
            self._put_ended()
            return
        if not self._pending or self._pending[0].tag != tag:
            expected = self._pending[0].tag if self._pending else "none"
            raise LedgerError(f"forward {tag} was committed out of launch order (expected {expected})")
        plan = self._pending.popleft()
        plan.discarded.update(retracted)
        for name, transfer in plan.travelling.items():
            setattr(plan, name, transfer.finish())
        if self._captures_rows and plan.rows is None and plan.unaccounted is None:
            raise LedgerError(f"forward {plan.forward_id} has no captured rows")
        commit = Commit(rows=plan.rows, selected=plan.selected, telemetry=plan.telemetry)
        if self._captures_rows:
            plan.row_start = self._next_row
        offset = unaccounted = 0
        lost: list[int] = []
        for i in range(len(plan.rids)):
            n = plan.ends[i] - plan.starts[i]
            if plan.rids[i] not in self._lost:
                try:
                    self._account(plan, i, offset, commit)
                    offset += n
                    continue
                except LedgerError as e:
                    if not self._tolerant:
                        raise
                    self._lose(plan.rids[i], e.message)
            unaccounted += n
            lost.append(i)
        if self._captures_rows:
            commit.numbered = offset
            self._next_row += offset
        if lost:
            cut(commit, plan, lost)
        if plan.watched is not None:
            commit.watched = plan.watched.without(plan.discarded | {plan.rids[i] for i in lost})
        for end in ended:
            self.end(end)
        self._close_ended(commit)
        decode = sum(plan.decoding)
        commit.forward = (
            plan.forward_id,
            plan.mode,
            len(plan.rids),
            plan.tokens - decode,
            decode,
            plan.slots,
            graph,
            plan.launched,
            now() - plan.launched,
            plan.waiting,
            plan.row_start,
            unaccounted if plan.unaccounted is None else plan.slots,
            plan.weights,
        )
        commit.rebinds, self._rebinds = self._rebinds, []
        commit.tree = [*self._tree.take(), *plan.matched]
        commit.budget = [(plan.forward_id, *astuple(event)) for event in plan.budget]
        self._sink.put(commit)

    @property
    def in_flight(self) -> Iterable[ForwardPlan]:
        """Forwards that were launched and not committed, oldest first."""
        return self._pending

    def drain(self) -> None:
        """Account for what is still in flight when the recording closes."""
        while self._pending:
            self.commit(self._pending[0].tag, graph=self._pending[0].graph)
        self._put_ended()

    def _put_ended(self) -> None:
        commit = Commit(rebinds=self._rebinds, tree=self._tree.take())
        self._rebinds = []
        self._close_ended(commit)
        self._sink.put(commit)

    def _account(self, plan: ForwardPlan, i: int, offset: int, commit: Commit) -> None:
        rid, attempt, start, end = plan.rids[i], plan.attempts[i], plan.starts[i], plan.ends[i]
        row = plan.row_start + offset if plan.row_start >= 0 else -1
        p = self._progress[rid]
        if p.attempt != attempt:  # retracted while this forward was in flight; the new attempt is launched already
            p = _Progress(attempt, covered=start)
        if start < p.covered:
            raise LedgerError(f"{rid}: position {start} launched again in attempt {attempt}; {p.covered} accounted")
        under, out = plan.under.get(i), commit.spans
        if under is not None:
            self._under[rid] = commit.interventions[rid] = under
        if (decision := plan.gates.get(i)) is not None:
            commit.gates[rid] = decision
        if plan.decoding[i]:
            if start != p.covered:
                raise LedgerError(f"{rid}: decode of position {start}, but {p.covered} positions are accounted for")
            phase = schema.OVERSHOOT if rid in plan.discarded else schema.DECODE
            out.extend(spans.computed(rid, attempt, start, end, phase, plan.forward_id, -1, row, under))
        else:
            if start > p.covered:
                out.extend(spans.reused(plan, i, p.covered, p.chunks, self._under))
            phase = schema.RECOMPUTE if attempt else schema.PREFILL
            out.extend(spans.computed(rid, attempt, start, end, phase, plan.forward_id, p.chunks, row, under))
            p.chunks += 1
        p.covered = end

    def _close_ended(self, commit: Commit) -> None:
        """Write requests that ended. Their progress stays until nothing of theirs is in flight."""
        commit.lost, self._newly_lost = self._newly_lost, []
        for end in self._ended:
            p = self._progress.get(end.rid)
            launched = p.launched if p else 0
            due = end.prompt_len + max(end.output_len - 1, 0)
            if end.rid in self._lost:
                end = replace(end, finish_reason=schema.UNACCOUNTED)
                attempt, covered = (p.attempt, p.covered) if p else (0, 0)
                if covered < due:
                    commit.spans.append(spans.nowhere(end.rid, attempt, covered, due, schema.DROPPED))
            elif launched < due:  # aborted before its prompt was done, or what a retraction had thrown away
                attempt = p.attempt if p else 0
                commit.spans.append(spans.nowhere(end.rid, attempt, launched, due, schema.UNREQUESTED))
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
            self._gone.append(end.rid)
        self._ended.clear()
        if not self._gone:
            return
        in_flight = {rid for plan in self._pending for rid in plan.discarded}
        for rid in self._gone:
            if rid not in in_flight:
                self._progress.pop(rid, None)
                self._lost.discard(rid)
        self._gone = [rid for rid in self._gone if rid in in_flight]
        if len(self._under) > self._under_limit:
            self._forget_interventions()

    def _forget_interventions(self) -> None:
        """Of requests none of whose entries can be reused any more."""
        remembers = self.lineage.remembers if self.lineage is not None else lambda _rid: False
        self._under = {rid: u for rid, u in self._under.items() if rid in self._progress or remembers(rid)}
        self._under_limit = max(_UNDER, 2 * len(self._under))


_UNDER = 4096
"""Requests whose interventions are kept before those of forgotten ones are looked for."""
