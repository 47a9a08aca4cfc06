"""Marks of interventions in spans: cut at the onset, and of reused entries those of their origin."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from sglang_probe.engine.ledger import recorder as module
from sglang_probe.engine.ledger.facts import BudgetEvent, Context, Decision, ForwardPlan, Under
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.part import OpenPart
from sglang_probe.engine.ledger.recorder import Recorder
from sglang_probe.engine.live.overflow import Overflow
from sglang_probe.run.schema import BUDGET, GATES
from tests.engine.ledger.test_recorder import TOKENS, Sink, decode, end, extend

LATE = Under("late", 7, 10, "[]")
ALL = Under("all", 0, 10, "[]")


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def recorder(sink: Sink) -> Recorder:
    return Recorder(sink, lineage=Lineage(1, 1000), captures_rows=True)


def run(recorder: Recorder, plan: ForwardPlan, under: Under | None = None) -> None:
    if under is not None:
        plan.under = {0: under}
    recorder.launch(plan)
    plan.rows = {}
    recorder.commit(plan.tag, graph=False)


def publish(recorder: Recorder, rid: str, first_new: int = 0) -> None:
    recorder.publish(rid, 0, Context(TOKENS, None), length=10, first_new=first_new, protected=first_new)


def spans(sink: Sink, rid: str) -> list[tuple[Any, ...]]:
    """start, end, status, row_start, mark."""
    return [(s[2], s[3], s[4], s[9], s[13]) for c in sink.commits for s in c.spans if s[0] == rid]


def test_a_part_has_the_decision_of_every_gated_request_with_a_span_in_it(recorder: Recorder, sink: Sink) -> None:
    decision = Decision("gated", "fires", "blocks.1.hook_resid_post", 9, 0, 0, 0.5, 0.25, True, "[]")
    for plan in (extend(1, "a", 0, 10), decode(2, ("a", 10))):
        plan.gates = {0: decision}
        run(recorder, plan)
    parts = [OpenPart(), OpenPart()]
    for part, commit in zip(parts, sink.commits, strict=True):
        part.take(commit)
        assert part._gates == {"a": decision}
        assert [*GATES.names] == ["rid", *(f.name for f in fields(decision))]


def test_what_becomes_of_the_budget_is_written_with_the_forward_that_took_it(recorder: Recorder, sink: Sink) -> None:
    plan = extend(1, "a", 0, 10)
    run(recorder, plan)
    later = decode(2, ("a", 10))
    recorder.launch(later)
    event = BudgetEvent(7.0, "exceeded", 3.0, 2.0)
    later.budget.append(event)  # while it runs
    later.rows = {}
    recorder.commit(2, graph=False)
    assert [c.budget for c in sink.commits] == [[], [(1, 7.0, "exceeded", 3.0, 2.0, None, None)]]
    assert [*BUDGET.names] == ["forward_id", *(f.name for f in fields(event))]
    part, overflow = OpenPart(), Overflow()
    overflow.absorb(sink.commits[1])  # the disk was too slow
    late = overflow.release()
    assert late is not None
    part.take(late)
    assert part._budget == sink.commits[1].budget


def test_a_chunk_is_cut_where_the_interventions_begin_and_its_rows_with_it(recorder: Recorder, sink: Sink) -> None:
    run(recorder, extend(1, "a", 0, 4), LATE)
    run(recorder, extend(2, "a", 4, 10), LATE)
    run(recorder, decode(3, ("a", 10)), LATE)
    assert spans(sink, "a") == [
        (0, 4, "computed", 0, None),
        (4, 7, "computed", 4, None),
        (7, 10, "computed", 7, "late"),
        (10, 11, "computed", 10, "late"),
    ]


def test_reused_spans_say_what_their_origin_ran_under_whatever_the_request_does(recorder: Recorder, sink: Sink) -> None:
    run(recorder, extend(1, "a", 0, 10), LATE)
    publish(recorder, "a")
    run(recorder, extend(2, "b", 9, 10))  # a plain request that hits steered entries: the ledger shows it
    run(recorder, extend(3, "c", 9, 10), ALL)
    assert spans(sink, "b") == [
        (0, 7, "reused", -1, None),
        (7, 9, "reused", -1, "late"),
        (9, 10, "computed", 10, None),
    ]
    assert [s[4] for s in spans(sink, "c")] == [None, "late", "all"]


def test_a_finished_origin_is_remembered_for_as_long_as_its_entries_may_be_reused(
    recorder: Recorder, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_UNDER", 1)
    recorder._under_limit = 1
    run(recorder, extend(1, "a", 0, 10), ALL)
    publish(recorder, "a")
    recorder.abort(end("a"))
    for tag, rid in enumerate(("x", "y", "z"), 2):  # publish nothing
        run(recorder, extend(tag, rid, 0, 10), ALL)
        recorder.abort(end(rid))
    assert set(recorder._under) == {"a"}
    run(recorder, extend(9, "b", 9, 10), ALL)
    assert spans(sink, "b")[0] == (0, 9, "reused", -1, "all")


def test_a_part_has_the_interventions_of_its_own_spans(recorder: Recorder, sink: Sink) -> None:
    run(recorder, extend(1, "a", 0, 10), LATE)
    run(recorder, extend(2, "b", 0, 10))
    run(recorder, decode(3, ("a", 10)), LATE)
    first, second = OpenPart(), OpenPart()
    for commit in sink.commits[:2]:
        first.take(commit)
    second.take(sink.commits[2])
    assert first._interventions == second._interventions == {"a": LATE}
