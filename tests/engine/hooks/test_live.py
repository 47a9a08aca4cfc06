"""What the endpoints do without, and what a broken probe does to a readback."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from sglang_probe.engine.hooks import http, resolved, scheduler
from sglang_probe.engine.hooks.config import CONFIG_VARIABLE, EngineProbeConfig
from sglang_probe.engine.hooks.instruments import live
from sglang_probe.engine.hooks.session import Session
from sglang_probe.engine.ledger.facts import Context, ForwardPlan
from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.engine.ledger.recorder import Recorder
from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.engine.live.config import LiveConfig
from sglang_probe.engine.live.recording import LiveRecording
from sglang_probe.harvest.death import fault_of
from sglang_probe.run import journal
from sglang_probe.run.run import load_run
from tests.engine.made_session import make_session


def test_several_http_processes_get_no_endpoints_and_a_word_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sglang_probe"):
        http.add_routes(SimpleNamespace(tokenizer_worker_num=2), None)
    assert "tokenizer-worker-num" in caplog.text


def test_a_failure_to_add_routes_costs_the_routes_only(caplog: pytest.LogCaptureFixture) -> None:
    http.add_routes(SimpleNamespace(), None)
    assert "could not add its endpoints" in caplog.text


def test_a_readback_without_a_recording_says_so() -> None:
    result = SimpleNamespace(internal_state={})
    live.get_internal_state(result, None)
    assert result.internal_state["probe"]["recording"] is False
    live.get_internal_state(object(), None)  # cannot be extended: no error


def test_the_manifest_names_no_keys() -> None:
    assert not [name for name in resolved.ARGUMENTS if any(word in name for word in ("key", "password", "secret"))]


class TestHowTheSchedulerEnds:
    """AROUND its event loop."""

    def recorded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
        session = make_session(monkeypatch, EngineProbeConfig(run=tmp_path, live=LiveConfig()))
        session.writer = session.live = LiveRecording(tmp_path, LiveConfig(), {"hook_points": {}})
        session.recorder = Recorder(session.live, lineage=Lineage(1, 1000), captures_rows=False)
        plan = ForwardPlan(1, "extend", ["a"], [0], [2], [False], [0], [2], [Context(np.array([3, 4]), None)], 2)
        session.recorder.launch(plan)
        session.live.launched(plan, set())
        session.recorder.commit(1, graph=False)
        return session

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (RuntimeError("CUDA error"), "SGLang's scheduler crashed: RuntimeError: CUDA error"),
            (KeyboardInterrupt(), "the server was ended by Ctrl-C with 1 requests in flight"),
        ],
    )
    def test_a_crash_closes_the_segment_as_interrupted_and_says_why(
        self, error: BaseException, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.recorded(tmp_path, monkeypatch)

        def crash(_scheduler: object) -> None:
            raise error

        with pytest.raises(type(error)):
            scheduler.run_event_loop(crash, object())
        run = load_run(tmp_path / "segment-00000")
        assert (run.manifest["status"], run.manifest["fault"]) == ("interrupted", said)
        assert run.manifest["requests_by_finish"] == {"interrupted": 1}

    def test_a_server_that_was_told_to_end_closes_it_as_complete(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.recorded(tmp_path, monkeypatch)
        assert scheduler.run_event_loop(lambda _scheduler: "ended", object()) == "ended"
        assert load_run(tmp_path / "segment-00000").complete

    def test_a_crash_after_a_harvest_was_closed_is_told_beside_its_configuration(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run, folder = tmp_path / "run", tmp_path / "folder"
        run.mkdir(), folder.mkdir()
        session = make_session(monkeypatch, EngineProbeConfig(run=run))
        monkeypatch.setenv(CONFIG_VARIABLE, str(folder / "probe-0.yaml"))
        session.writer = Writer(run)
        session.recorder = Recorder(session.writer, lineage=Lineage(1, 1000), captures_rows=False)
        session.close()

        def crash(_scheduler: object) -> None:
            raise RuntimeError("Connection reset by peer")

        with pytest.raises(RuntimeError):
            scheduler.run_event_loop(crash, object())
        assert fault_of(run) is None
        assert "Connection reset" in str(fault_of(folder))

    def test_of_a_harvest_a_crash_leaves_the_reason_and_what_was_committed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session = make_session(monkeypatch, EngineProbeConfig(run=tmp_path))
        session.writer = Writer(tmp_path)
        session.recorder = Recorder(session.writer, lineage=Lineage(1, 1000), captures_rows=False)
        for tag in (1, 2):  # the second is in flight, and may be what failed
            span = (2 * tag - 2, 2 * tag)
            rids, context = [f"r{tag}"], Context(np.array([3, 4]), None)
            plan = ForwardPlan(tag, "extend", rids, [0], [2], [False], [0], [2], [context], span[1] - span[0])
            session.recorder.launch(plan)
        session.recorder.commit(1, graph=False)

        def crash(_scheduler: object) -> None:
            raise IndexError("index out of range in self")

        with pytest.raises(IndexError):
            scheduler.run_event_loop(crash, object())
        assert fault_of(tmp_path) == "SGLang's scheduler crashed: IndexError: index out of range in self"
        (part,) = journal.read(tmp_path)
        assert part.forwards_end == 1

    def test_where_the_disk_of_the_run_is_full_the_reason_lies_beside_the_configuration(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "config").mkdir()
        monkeypatch.setenv("SGLANG_PROBE", str(tmp_path / "config" / "probe-0.yaml"))
        session = make_session(monkeypatch, EngineProbeConfig(run=tmp_path / "config" / "probe-0.yaml" / "no folder"))
        (tmp_path / "config" / "probe-0.yaml").touch()
        session.fail("put", OSError("No space left on device"))
        assert "No space left on device" in (fault_of(tmp_path / "config") or "")
