"""Segments: when they are closed, what crosses a border, and what a dead server leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_probe.engine.live import segments
from sglang_probe.errors import RunDirectoryError
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import load_run
from sglang_probe.verify.verify import verify
from tests.amended import amend
from tests.engine.live.conftest import EMBEDDING, FakeEngine, checked, notes, violations

A, B = [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]


def test_a_closed_segment_is_a_complete_run_that_verifies(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine()
    engine.serve("a", A)
    engine.serve("b", B, reused=4)
    run, checks = checked(engine.flush())
    assert run.complete
    assert violations(checks) == []
    assert run.requests()["rid"].tolist() == ["a", "b"]
    assert run.manifest["positions_by_status"] == {"computed": 4 + 2 + 2 + 2, "reused": 4}
    assert run.tokens()["token_id"].unique().tolist() == [-1]


def test_a_segment_is_closed_when_its_requests_are_many_enough(
    make_engine: Callable[..., FakeEngine], wait: Callable[..., None]
) -> None:
    engine = make_engine(segments={"max_requests": 2})
    for i in range(2):
        engine.serve(f"r{i}", [i, *A])
    wait(lambda: engine.live.status()["segments_closed"] == 1)
    engine.serve("r2", A)
    assert engine.live.status()["segment"]["number"] == 1
    assert violations(checked(segments.segment_path(engine.live.root, 0))[1]) == []


def test_a_due_segment_waits_for_a_moment_without_requests_but_not_for_ever(
    make_engine: Callable[..., FakeEngine], wait: Callable[..., None]
) -> None:
    patient = make_engine("patient", segments={"max_seconds": 0.01, "patience": 60})
    patient.prefill("a", A)
    patient.prefill("b", [7, 8, 9])
    patient.decode("a", "b", n=3)
    assert patient.live.status()["segments_closed"] == 0
    patient.end("a", "b")
    wait(lambda: patient.live.status()["segments_closed"] == 1)
    assert load_run(patient.live.root / "segment-00000").manifest["requests_by_finish"] == {"length": 2}

    hasty = make_engine("hasty", segments={"max_seconds": 0.01, "patience": 0})
    hasty.prefill("a", A)
    wait(lambda: hasty.live.status()["segments_closed"] == 1)
    assert load_run(hasty.live.root / "segment-00000").manifest["requests_by_finish"] == {"continues": 1}


def test_requests_and_origins_may_lie_across_a_border(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine()
    engine.prefill("a", A)
    engine.decode("a", n=2)
    first = engine.flush()
    engine.decode("a", n=2)
    engine.serve("b", B, reused=4)
    engine.end("a")
    second = engine.flush()

    before, checks = checked(first)
    assert violations(checks) == []
    assert "1 requests continue in another segment" in notes(checks)
    assert before.requests()["finish_reason"].tolist() == ["continues"]
    after, checks = checked(second)
    assert violations(checks) == []
    assert "1 requests began in the segment before" in notes(checks)
    assert "4 reused positions were computed in another segment" in notes(checks)
    assert after.manifest["segment"]["carried_in"] == {"a": [0, 6]}
    spans = after.spans()
    assert set(spans.loc[spans["status"] == "reused", "origin_rid"]) == {"a"}


@pytest.mark.parametrize(("times", "wrong"), [(1, []), (2, ["a: attempt 2 is there without the one before it"])])
def test_a_request_that_is_retracted_at_a_border_goes_on_with_its_next_attempt(
    make_engine: Callable[..., FakeEngine], times: int, wrong: list[str]
) -> None:
    engine = make_engine()
    engine.prefill("a", A)
    engine.decode("a", n=2)
    engine.flush()
    engine.retract("a", times)
    engine.end("a")
    after, checks = checked(engine.flush())
    assert violations(checks) == wrong
    assert after.manifest["segment"]["carried_in"] == {"a": [0, 6]}


def test_a_border_that_is_not_written_down_is_a_gap(make_engine: Callable[..., FakeEngine]) -> None:
    """Negative control: without the manifest's word, the same spans are a violation."""
    engine = make_engine()
    engine.prefill("a", A)
    engine.flush()
    engine.decode("a")
    engine.end("a")
    path = engine.flush()
    assert violations(checked(path)[1]) == []
    amend(path, lambda manifest: manifest["segment"].update(carried_in={}))
    assert any("gap in a at position 0" in v for v in violations(checked(path)[1]))


def test_an_origin_that_nobody_computed_is_still_a_violation_in_a_first_segment(
    make_engine: Callable[..., FakeEngine],
) -> None:
    """Negative control: the leniency towards other segments ends where there is no other segment."""
    engine = make_engine()
    engine.serve("a", A)
    engine.flush()
    engine.serve("b", B, reused=4)
    path = engine.flush()
    assert violations(checked(path)[1]) == []
    amend(path, lambda manifest: manifest["segment"].update(first_of_process=True, number=0))
    assert any("a never computed it" in v for v in violations(checked(path)[1]))


def test_a_flush_without_traffic_makes_no_empty_segment(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine()
    engine.serve("a", A)
    assert engine.flush() == engine.flush()
    assert engine.live.status()["segment"]["number"] == 1


def test_rows_are_numbered_from_the_start_of_their_segment(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine(rows=True, drops=False, privacy="ids")
    engine.serve("a", A)
    engine.flush()
    engine.serve("b", B, reused=4)
    run = load_run(engine.flush())
    checks = verify(run, embedding=EMBEDDING)
    assert violations(checks) == []
    assert next(c.covered for c in checks if c.name == "content") == run.manifest["rows"] == 4


def test_what_a_dead_server_left_is_interrupted_and_a_new_segment_begins(
    make_engine: Callable[..., FakeEngine], wait: Callable[..., None]
) -> None:
    dead = make_engine()
    dead.serve("a", A)
    dead.prefill("b", [7, 8])
    dead.live.segment.writer.flush()
    dead.live._keeper._handle.release()  # what the kernel does when a process dies

    engine = make_engine()
    assert engine.live.status()["segments_interrupted_before"] == ["segment-00000"]
    assert engine.live.status()["segment"]["number"] == 1
    run, checks = checked(engine.live.root / "segment-00000")
    assert violations(checks) == []
    assert (run.manifest["status"], run.complete) == ("interrupted", False)
    assert run.manifest["requests_by_finish"] == {"length": 1, "interrupted": 1}


def test_two_servers_cannot_record_into_one_directory(make_engine: Callable[..., FakeEngine]) -> None:
    make_engine()
    with pytest.raises(RunDirectoryError, match="another server records"):
        make_engine()


def test_a_damaged_old_segment_does_not_keep_a_server_from_starting(
    make_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    (tmp_path / "live" / "segment-00000").mkdir(parents=True)
    (tmp_path / "live" / "segment-00000" / MANIFEST).write_text("{")
    assert make_engine().live.status()["segment"]["number"] == 1


def test_closing_says_complete_and_a_fault_says_incomplete(make_engine: Callable[..., FakeEngine]) -> None:
    good, bad = make_engine("good"), make_engine("bad")
    for engine in (good, bad):
        engine.serve("a", A)
    good.live.close()
    bad.live.close(status="incomplete", fault="why")
    assert load_run(good.live.root / "segment-00000").complete
    manifest = load_run(bad.live.root / "segment-00000").manifest
    assert (manifest["status"], manifest["fault"]) == ("incomplete", "why")


def test_a_client_may_use_the_same_id_again(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine()
    engine.serve("retry", A)
    engine.serve("retry", B, reused=4)
    engine.serve("retry", [7, 8, 9])
    run, checks = checked(engine.flush())
    assert violations(checks) == []
    assert run.requests()["rid"].tolist() == ["retry", "retry~1", "retry~2"]
    assert run.requests()["prompt_len"].tolist() == [4, 6, 3]
    engine.serve("retry", [7, 8])
    # Entries of the first may still be reused, and must not be taken for those of this one.
    assert load_run(engine.flush()).requests()["rid"].tolist() == ["retry~3"]
