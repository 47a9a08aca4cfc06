"""Totals, provenance, and what happens when the disk is too slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pandas as pd
import pytest

from sglang_probe.engine.ledger.facts import Commit
from sglang_probe.engine.live import overflow
from sglang_probe.engine.live.totals import Totals
from tests.engine.live.conftest import FakeEngine, checked, notes, violations

A, B = [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]


def test_totals_count_every_position_once(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine()
    engine.serve("a", A)
    engine.serve("b", B, reused=4)
    status = engine.live.status()
    assert {k: v for k, v in status["positions"].items() if v} == {"computed": 6, "reused": 4, "decode": 4}
    assert (status["requests"], status["requests_in_flight"], status["forwards"]) == (2, 0, 6)
    latest = status["recent"][0]
    assert abs(latest.pop("ended") - time.time()) < 60
    assert latest == {"rid": "b", "prompt": 6, "reused": 4, "computed": 2, "decode": 2, "finish": "length"}


def test_memory_does_not_grow_with_ended_requests() -> None:
    totals = Totals(recent=3)
    for i in range(5000):
        totals.count(Commit(requests=[(f"r{i}", 4, 1, 0, 0, "length", None)]))
    assert len(totals._ended) == 1024
    assert [r["rid"] for r in totals.recent()] == ["r4999", "r4998", "r4997"]
    assert not totals.active


def test_provenance_names_the_origin_and_includes_the_step_not_yet_committed(
    make_engine: Callable[..., FakeEngine],
) -> None:
    engine = make_engine()
    engine.serve("a", A)
    seen = []
    count = engine.live.totals.count

    def while_processing(commit: Commit) -> None:
        if commit.requests:  # SGLang streams the last output before the ledger commits the forward
            seen.append(engine.live.provenance("b"))
        count(commit)

    engine.live.totals.count = while_processing  # type: ignore[method-assign]
    engine.prefill("b", B, reused=4, asking=True)
    engine.decode("b", n=2)
    engine.end("b")
    assert [(s["start"], s["end"], s["status"], s["phase"], s["origin"]) for s in seen[0]] == [
        (0, 4, "reused", None, "a"),
        (4, 6, "computed", "prefill", None),
        (6, 9, "computed", "decode", None),
    ]
    assert engine.live.provenance("b") is None
    assert engine.live.totals.asking == 0


def test_provenance_of_a_request_that_ends_with_its_prefill(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine()
    engine.serve("a", A)
    launched = engine.live.launched
    seen = []

    def launch(plan: object, asking: set[str]) -> None:
        launched(plan, asking)  # type: ignore[arg-type]
        seen.append(engine.live.provenance("b"))

    engine.live.launched = launch  # type: ignore[method-assign]
    engine.prefill("b", B, reused=4, asking=True)
    assert [(s["start"], s["end"], s["origin"]) for s in seen[0]] == [(0, 4, "a"), (4, 6, None)]


def test_facts_that_find_no_room_are_dropped_and_the_ledger_says_so(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine(queue=2)
    gate = threading.Event()
    writer = engine.live.segment.writer
    write = writer._write
    writer._write = lambda **how: (gate.wait(20), write(**how))[1]  # type: ignore[method-assign]
    engine.serve("a", A, n=12)
    engine.serve("b", B, reused=4)  # reuses what was computed, though the fact was lost or not
    stalled = engine.live.status()
    assert stalled["positions"]["dropped"] > 8
    assert stalled["forwards_dropped"] > 8
    gate.set()
    engine.serve("c", [9, 8, 7])
    run, checks = checked(engine.flush())
    assert violations(checks) == []
    lost = run.spans().query("status == 'dropped'")
    assert (lost["end"] - lost["start"]).sum() == engine.live.status()["positions"]["dropped"]
    assert "dropped because the disk was too slow" in notes(checks)
    assert sorted(run.requests()["rid"]) == ["a", "b", "c"]


def test_a_short_queue_drops_nothing_while_the_disk_keeps_up(
    make_engine: Callable[..., FakeEngine], wait: Callable[..., None]
) -> None:
    """The writer is woken before the queue is full, not once there is a bundle of many."""
    engine = make_engine(queue=3)
    for i in range(20):
        engine.serve(f"r{i}", [i, *A], n=1)
        wait(lambda: engine.live.status()["queue"]["waiting"] <= 1)
    assert engine.live.status()["forwards_dropped"] == 0


def test_by_configuration_the_scheduler_waits_for_the_disk_instead(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine(queue=1, drops=False)
    for i in range(20):
        engine.serve(f"r{i}", [i, *A])
    run, checks = checked(engine.flush())
    assert violations(checks) == []
    assert engine.live.status()["positions"]["dropped"] == 0
    assert len(run.requests()) == 20


@pytest.mark.parametrize("level", ["ids", "hashes"])
def test_prompts_without_room_in_memory_are_not_known_and_everything_else_is(
    level: str, make_engine: Callable[..., FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overflow, "_PROMPT_BYTES", 0)
    engine = make_engine(queue=2, privacy=level)
    gate = threading.Event()
    writer = engine.live.segment.writer
    write = writer._write
    writer._write = lambda **how: (gate.wait(20), write(**how))[1]  # type: ignore[method-assign]
    engine.serve("a", A, n=12)
    gate.set()
    run, checks = checked(engine.flush())
    assert violations(checks) == []
    told = run.requests().iloc[0]
    assert (told["rid"], told["prompt_len"]) == ("a", len(A))
    assert told["prompt_ids"] is None
    assert pd.isna(told["prompt_hash"])
