"""Spans from launches and commits, on the smallest sequences in which each rule matters."""

from __future__ import annotations

import time

import numpy as np
import pytest

from sglang_probe.engine.ledger.clock import now
from sglang_probe.engine.ledger.facts import Commit, Context, ForwardPlan, RequestEnd
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.recorder import Recorder
from sglang_probe.errors import LedgerError
from sglang_probe.run import schema


class Sink:
    def __init__(self) -> None:
        self.commits: list[Commit] = []

    def put(self, commit: Commit) -> None:
        self.commits.append(commit)

    def spans(self, rid: str) -> list[tuple[int, int, str, str | None, int]]:
        """(start, end, status, phase, forward) of a request's spans."""
        return [(s[2], s[3], s[4], s[5], s[6]) for c in self.commits for s in c.spans if s[0] == rid]


TOKENS = np.arange(100, 200)


def extend(tag: int, rid: str, start: int, end: int, *, attempt: int = 0, prompt: int = 10) -> ForwardPlan:
    return ForwardPlan(
        tag, "extend", [rid], [start], [end], [False], [attempt], [prompt], [Context(TOKENS, None)], end - start
    )


def decode(tag: int, *at: tuple[str, int], attempt: int = 0) -> ForwardPlan:
    rids, positions = [r for r, _ in at], [p for _, p in at]
    n = len(at)
    return ForwardPlan(
        tag, "decode", rids, positions, [p + 1 for p in positions], [True] * n, [attempt] * n, [10] * n, [None] * n, n
    )


def end(rid: str, *, prompt: int = 10, output: int = 1, reason: str = "length") -> RequestEnd:
    return RequestEnd(rid, prompt, output, 0, 0, reason, list(range(output)))


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def recorder(sink: Sink) -> Recorder:
    return Recorder(sink, lineage=Lineage(1, 1000), captures_rows=False)


def test_positions_below_the_first_computed_one_are_reused(recorder: Recorder, sink: Sink) -> None:
    recorder.launch(extend(1, "a", 6, 10))
    recorder.commit(1, graph=False)
    assert sink.spans("a") == [(0, 6, "reused", None, 0), (6, 10, "computed", "prefill", 0)]


def test_a_continued_chunk_reuses_nothing(recorder: Recorder, sink: Sink) -> None:
    recorder.launch(extend(1, "a", 0, 4))
    recorder.commit(1, graph=False)
    recorder.launch(extend(2, "a", 4, 10))
    recorder.commit(2, graph=False)
    assert sink.spans("a") == [(0, 4, "computed", "prefill", 0), (4, 10, "computed", "prefill", 1)]


def test_a_step_in_flight_when_its_request_stops_is_an_overshoot(recorder: Recorder, sink: Sink) -> None:
    recorder.launch(extend(1, "a", 0, 10))
    recorder.commit(1, graph=False)
    recorder.launch(decode(2, ("a", 10)))
    recorder.launch(decode(3, ("a", 11)))  # overlap scheduling: launched before the result of 2 is seen
    recorder.commit(2, graph=False, ended=[end("a", output=2, reason="stop")])
    recorder.commit(3, graph=False)
    assert sink.spans("a")[1:] == [(10, 11, "computed", "decode", 1), (11, 12, "computed", "overshoot", 2)]


def test_a_step_in_flight_when_its_request_is_retracted_is_an_overshoot_too(recorder: Recorder, sink: Sink) -> None:
    recorder.launch(extend(1, "a", 0, 10))
    recorder.commit(1, graph=False)
    recorder.launch(decode(2, ("a", 10)))
    recorder.commit(2, graph=False, retracted={"a"})
    assert sink.spans("a")[1:] == [(10, 11, "computed", "overshoot", 1)]


def test_a_length_finish_has_no_overshoot(recorder: Recorder, sink: Sink) -> None:
    recorder.launch(extend(1, "a", 0, 10))
    recorder.commit(1, graph=False)
    recorder.launch(decode(2, ("a", 10)))
    recorder.commit(2, graph=False, ended=[end("a", output=2)])
    assert sink.spans("a")[1:] == [(10, 11, "computed", "decode", 1)]


def test_a_retracted_request_starts_a_new_attempt_and_overwrites_nothing(recorder: Recorder, sink: Sink) -> None:
    recorder.launch(extend(1, "a", 0, 10))
    recorder.commit(1, graph=False)
    recorder.launch(extend(2, "a", 4, 11, attempt=1))
    recorder.commit(2, graph=False)
    attempts = [(s[1], s[2], s[3], s[4], s[5]) for c in sink.commits for s in c.spans]
    assert attempts == [
        (0, 0, 10, "computed", "prefill"),
        (1, 0, 4, "reused", None),
        (1, 4, 11, "computed", "recompute"),
    ]


def test_what_an_aborted_prompt_never_reached_is_unrequested(recorder: Recorder, sink: Sink) -> None:
    recorder.launch(extend(1, "a", 0, 4))
    recorder.commit(1, graph=False, ended=[end("a", output=0, reason="abort")])
    assert sink.spans("a") == [(0, 4, "computed", "prefill", 0), (4, 10, "unrequested", None, -1)]


def test_commits_out_of_launch_order_are_refused(recorder: Recorder) -> None:
    recorder.launch(extend(1, "a", 0, 10))
    recorder.launch(extend(2, "b", 0, 10))
    with pytest.raises(LedgerError, match="out of launch order"):
        recorder.commit(2, graph=False)


def test_a_position_computed_twice_in_one_attempt_is_refused(recorder: Recorder) -> None:
    recorder.launch(extend(1, "a", 0, 10))
    recorder.commit(1, graph=False)
    recorder.launch(extend(2, "a", 9, 12))
    with pytest.raises(LedgerError, match="launched again"):
        recorder.commit(2, graph=False)


def test_a_skipped_decode_position_is_refused(recorder: Recorder) -> None:
    recorder.launch(extend(1, "a", 0, 10))
    recorder.commit(1, graph=False)
    recorder.launch(decode(2, ("a", 11)))
    with pytest.raises(LedgerError, match="decode of position 11"):
        recorder.commit(2, graph=False)


def test_rows_are_numbered_in_batch_order_across_forwards(sink: Sink) -> None:
    recorder = Recorder(sink, lineage=Lineage(1, 1000), captures_rows=True, first_row=100)
    prefill = ForwardPlan(
        1, "extend", ["a", "b"], [2, 0], [10, 10], [False, False], [0, 0], [10, 10], [Context(TOKENS, None)] * 2, 18
    )
    for plan in (prefill, decode(2, ("b", 10), ("a", 10))):
        recorder.launch(plan)
        plan.rows = {}
        recorder.commit(plan.tag, graph=False)
    rows = {(s[0], s[2]): s[9] for c in sink.commits for s in c.spans}
    assert rows == {("a", 0): -1, ("a", 2): 100, ("b", 0): 108, ("b", 10): 118, ("a", 10): 119}


def test_a_forward_without_its_rows_is_refused(sink: Sink) -> None:
    recorder = Recorder(sink, lineage=Lineage(1, 1000), captures_rows=True)
    recorder.launch(extend(1, "a", 0, 10))
    with pytest.raises(LedgerError, match="no captured rows"):
        recorder.commit(1, graph=False)


def test_closing_accounts_for_what_is_in_flight(recorder: Recorder, sink: Sink) -> None:
    recorder.launch(extend(1, "a", 0, 10))
    recorder.drain()
    assert sink.spans("a") == [(0, 10, "computed", "prefill", 0)]


def test_reused_spans_are_cut_where_their_origin_changes(recorder: Recorder, sink: Sink) -> None:
    recorder.launch(extend(1, "a", 0, 4, prompt=4))
    recorder.commit(1, graph=False)
    recorder.publish("a", 0, Context(TOKENS, None), length=4, first_new=0, protected=0)
    recorder.launch(extend(2, "b", 4, 7, prompt=7))
    recorder.commit(2, graph=False)
    recorder.publish("b", 0, Context(TOKENS, None), length=7, first_new=4, protected=4)
    recorder.launch(extend(3, "c", 7, 10))
    recorder.commit(3, graph=False)
    spans = [(s[2], s[3], s[4], s[11]) for c in sink.commits for s in c.spans if s[0] == "c"]
    assert spans == [(0, 4, "reused", "a"), (4, 7, "reused", "b"), (7, 10, "computed", None)]


def test_what_was_in_the_tree_before_the_recording_has_no_origin(recorder: Recorder, sink: Sink) -> None:
    recorder.launch(extend(1, "a", 6, 10))
    recorder.commit(1, graph=False)
    assert next((s[2], s[3], s[11], s[12]) for c in sink.commits for s in c.spans) == (0, 6, None, None)


def test_a_duplicate_in_one_batch_is_rebound_to_the_first(recorder: Recorder, sink: Sink) -> None:
    both = ForwardPlan(
        1, "extend", ["a", "b"], [0, 0], [10, 10], [False] * 2, [0, 0], [10, 10], [Context(TOKENS, None)] * 2, 18
    )
    recorder.launch(both)
    recorder.publish("a", 0, Context(TOKENS, None), length=10, first_new=0, protected=0)
    recorder.publish("b", 0, Context(TOKENS, None), length=10, first_new=10, protected=0)
    recorder.commit(1, graph=False)
    assert [r for c in sink.commits for r in c.rebinds] == [("b", 0, 0, 10, 1, "a", 0)]
    assert [s[4] for c in sink.commits for s in c.spans] == ["computed", "computed"]


def test_an_abort_in_the_middle_of_a_prompt_keeps_the_chunk_in_flight(recorder: Recorder, sink: Sink) -> None:
    recorder.launch(extend(1, "a", 0, 4))
    recorder.commit(1, graph=False)
    recorder.launch(extend(2, "a", 4, 8))
    recorder.abort(end("a", output=0, reason="abort"))
    recorder.commit(2, graph=False)
    spans = sink.spans("a")
    assert sorted(spans)[1:] == [(4, 8, "computed", "prefill", 1), (8, 10, "unrequested", None, -1)]


def test_an_abort_while_output_is_computed_again_leaves_that_unrequested_too(recorder: Recorder, sink: Sink) -> None:
    """Found by attack, seed 180: retracted behind its third token, aborted in the first chunk of the next attempt."""
    recorder.launch(extend(1, "a", 0, 10))
    recorder.commit(1, graph=False)
    for tag, position in ((2, 10), (3, 11)):
        recorder.launch(decode(tag, ("a", position)))
        recorder.commit(tag, graph=False)
    recorder.launch(extend(4, "a", 0, 6, attempt=1))
    recorder.commit(4, graph=False, ended=[end("a", output=3, reason="abort")])
    assert sink.spans("a")[-2:] == [(0, 6, "computed", "recompute", 3), (6, 12, "unrequested", None, -1)]


def test_a_request_dropped_from_the_queue_is_unrequested_whole(recorder: Recorder, sink: Sink) -> None:
    recorder.abort(end("a", output=0, reason="abort"))  # at once: an idle engine commits nothing that could bring it
    assert sink.spans("a") == [(0, 10, "unrequested", None, -1)]


def test_flushes_of_an_idle_server_are_one_event(recorder: Recorder, sink: Sink) -> None:
    for _ in range(1000):
        recorder.flushed()
    recorder.asked()
    recorder.flushed()  # a request that asked in between is told apart
    recorder.launch(extend(1, "a", 0, 10))
    recorder.commit(1, graph=False)
    assert [(e[0], e[2]) for e in sink.commits[0].tree] == [
        (0, "opened"),
        (1, "flushed"),
        (3, "flushed"),
        (4, "matched"),
    ]


def test_a_clock_that_is_set_back_does_not_turn_a_recording_round(
    recorder: Recorder, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert abs(now() - time.time()) < 60, "it is unix time"
    for tag, at in ((1, 2e9), (2, 1e9)):
        monkeypatch.setattr(time, "time", lambda at=at: at)
        recorder.launch(extend(tag, f"r{tag}", 0, 10))
        recorder.commit(tag, graph=False)
    columns = [dict(zip(schema.FORWARDS.names, commit.forward, strict=True)) for commit in sink.commits]
    assert 0 <= columns[1]["launched"] - columns[0]["launched"] < 60
    assert all(0 <= c["seconds"] < 60 for c in columns)
