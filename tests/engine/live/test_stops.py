"""A recording that stops begins again, and says so; flushes and updates of the weights make segments, but few."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest

from sglang_probe.engine.live import segments, stops
from sglang_probe.engine.live.stops import DISK, LEDGER, PROBE, DiskTooSlow, Stops, reason_of
from sglang_probe.errors import LedgerError
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import load_run
from tests.engine.live.conftest import FakeEngine, checked, notes, violations

A, B = [1, 2, 3, 4], [1, 2, 3, 4, 5, 6]
Wait = Callable[..., None]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stops, "_FIRST", 0.05)


def test_after_a_stop_another_segment_begins_and_both_verify(
    make_engine: Callable[..., FakeEngine], wait: Wait
) -> None:
    engine = make_engine()
    engine.serve("a", A)
    engine.prefill("long", [7, 8, 9])
    engine.decode("long", n=2)
    engine.live.stop("why", PROBE)
    wait(lambda: engine.live.status()["recording"])
    assert engine.live.status()["stops"] == {"disk": 0, "ledger": 0, "probe": 1}
    engine.follow()
    engine.decode("long", n=2)  # in flight all the while: it goes on, from where it is
    engine.serve("b", B, reused=4)
    engine.end("long")
    engine.serve("c", [*B, 1], reused=6)
    second = engine.flush()

    before, checks = checked(second.with_name("segment-00000"))
    assert violations(checks) == []
    assert (before.manifest["status"], before.manifest["fault"]) == ("incomplete", "why")
    assert before.manifest["requests_by_finish"] == {"length": 1, "interrupted": 1}
    after, checks = checked(second)
    assert violations(checks) == []
    assert after.manifest["requests_by_finish"] == {"length": 3}
    assert after.manifest["segment"]["carried_in"] == {"long": [0, 5]}
    assert after.manifest["segment"]["first_of_process"]
    spans = after.spans().query("status == 'reused'")
    origins = spans.sort_values(["rid", "start"])[["rid", "start", "end", "origin_rid"]].astype(object)
    assert origins.where(origins.notna(), None).to_numpy().tolist() == [
        ["b", 0, 4, None],  # computed before the recording began again
        ["c", 0, 4, None],
        ["c", 4, 6, "b"],
    ]
    assert after.forwards()["forward_id"].min() > before.forwards()["forward_id"].max()
    assert "1 requests began in the segment before" in notes(checks)


def test_what_is_told_while_nothing_is_recorded_changes_nothing(
    make_engine: Callable[..., FakeEngine], wait: Wait
) -> None:
    engine = make_engine()
    engine.serve("a", A)
    recorder = engine.recorder
    engine.live.stop("why", LEDGER)
    engine.serve("lost", [5, 6])
    wait(lambda: engine.live.status()["recording"])
    assert engine.recorder is recorder
    engine.serve("of the old recorder", [5, 6])  # it has not been replaced yet
    engine.follow()
    engine.serve("b", [7, 8])
    run, checks = checked(engine.flush())
    assert violations(checks) == []
    assert run.requests()["rid"].tolist() == ["b"]


def test_a_disk_that_fails_is_noticed_without_traffic_and_waited_for(
    make_engine: Callable[..., FakeEngine], wait: Wait
) -> None:
    engine = make_engine()
    engine.serve("a", A)
    root, aside = engine.live.root, engine.live.root.with_name("aside")
    root.rename(aside)
    root.write_text("no folder")
    engine.serve("b", [7, 8])
    wait(lambda: not engine.live.status()["recording"])
    wait(lambda: engine.live.status()["write_errors"] > 2)  # it tries again
    status = engine.live.status()
    assert "the writer stopped" in status["reason"]
    assert status["stops"]["disk"] == 1
    assert status["tries_again_in"] is not None
    root.unlink()
    shutil.move(aside, root)
    wait(lambda: engine.live.status()["recording"])
    engine.follow()
    engine.serve("c", [9, 10])
    run, checks = checked(engine.flush())
    assert violations(checks) == []
    assert run.requests()["rid"].tolist() == ["c"]
    engine.live.close()
    assert load_run(root / "segment-00000").manifest["status"] == "incomplete"


def test_attempts_come_at_longer_and_longer_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stops, "_FIRST", 1.0)
    now = [1000.0]
    monkeypatch.setattr(stops.time, "monotonic", lambda: now[0])
    state = Stops()
    waits = []
    for _ in range(9):
        state.stop("why", DISK)
        waits.append(state.state()["tries_again_in"])
        assert not state.due
        now[0] += waits[-1]
        assert state.due
        state.resume()
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    now[0] += 61.0  # it has been well for a while
    state.stop("why", DISK)
    assert state.state()["tries_again_in"] == 1.0


def test_every_error_has_one_of_few_reasons() -> None:
    for error, reason in (
        (OSError(28, "no space"), DISK),
        (TimeoutError(), DISK),
        (DiskTooSlow("slow"), DISK),
        (LedgerError("x"), LEDGER),
        (KeyError("x"), PROBE),
    ):
        assert reason_of(error) == reason


def test_flushes_that_come_too_soon_wait_and_share_one_segment(
    make_engine: Callable[..., FakeEngine], wait: Wait
) -> None:
    engine = make_engine(segments={"min_seconds": 1.0})
    engine.serve("a", A)
    engine.flush()  # the first need not wait
    for i in range(5):
        engine.serve(f"b{i}", [7, 8, i])
        asked = engine.live.ask_flush()
    assert engine.live.status()["segments_closed"] == 1
    wait(lambda: engine.live.status()["flush"]["done"] >= asked)
    assert engine.live.status()["segments_closed"] == 2
    assert len(load_run(engine.live.root / "segment-00001").requests()) == 5


def test_a_flush_of_nothing_says_so(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine()
    engine.serve("a", A)
    engine.flush()
    assert not engine.live.status()["flush"]["nothing_new"]
    engine.flush()
    assert engine.live.status()["flush"]["nothing_new"]


def test_an_update_of_the_weights_begins_a_segment_and_forwards_say_which_they_had(
    make_engine: Callable[..., FakeEngine], wait: Wait
) -> None:
    engine = make_engine(rows=True, drops=False, privacy="ids")
    engine.serve("a", A)
    engine.update_weights("v2")
    wait(lambda: engine.live.status()["segments_closed"] == 1)
    engine.serve("b", B, reused=4)
    path = engine.flush()
    first, second = load_run(path.with_name("segment-00000")), load_run(path)
    assert [sorted(run.forwards()["weights"].unique()) for run in (first, second)] == [[0], [1]]
    assert second.manifest["weights"][-1]["version"] == "v2"
    checks = checked(path)[1]
    assert violations(checks) == []
    # Rows of other weights are compared with nothing.
    assert next(c.covered for c in checks if c.name == "consistency") == 0
    assert "4 rows were computed after an update of the weights" in notes(checks)


def test_reuse_across_an_update_within_a_segment_is_named(make_engine: Callable[..., FakeEngine]) -> None:
    engine = make_engine()
    engine.serve("a", A)
    engine.weights = 1  # before the keeper has turned
    engine.serve("b", B, reused=4)
    engine.live.weights = [*engine.live.weights, {"number": 1, "how": "update_weights_from_disk"}]
    checks = checked(engine.flush())[1]
    assert violations(checks) == []
    assert "4 reused positions were computed with earlier weights" in notes(checks)


def test_an_update_without_traffic_makes_no_empty_segment(make_engine: Callable[..., FakeEngine], wait: Wait) -> None:
    engine = make_engine()
    engine.update_weights("v2")
    path = segments.segment_path(engine.live.root, 0)
    wait(lambda: len(json.loads((path / MANIFEST).read_text())["weights"]) == 2)
    assert engine.live.status()["segments_closed"] == 0
