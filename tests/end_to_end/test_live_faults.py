"""A server that is killed, and a disk that fails: requests go on, and the directory says what happened."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sglang_probe.run.run import load_run
from sglang_probe.verify.verify import verify
from tests.end_to_end.live_server import LiveServer

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_a_killed_server_leaves_an_interrupted_segment_and_the_next_one_goes_on(tmp_path: Path) -> None:
    server = LiveServer(tmp_path, privacy="ids")
    try:
        server.wait_until_ready()
        for i in range(5):
            server.generate([9, *range(100, 130), i], rid=f"before-{i}")
        time.sleep(4)  # checkpoint_seconds is 2
    finally:
        server.kill()
    assert load_run(server.run / "segment-00000").manifest["status"] == "recording"

    server = LiveServer(tmp_path, privacy="ids")
    try:
        server.wait_until_ready()
        server.generate([9, *range(100, 130)], rid="after")
        status = server.status()
        assert status["segments_interrupted_before"] == ["segment-00000"]
        assert status["segment"]["number"] == 1
        run = load_run(server.run / "segment-00000")
        assert run.manifest["status"] == "interrupted"
        assert {f"before-{i}" for i in range(5)} <= set(run.requests()["rid"])
        assert [c.violation for c in verify(run) if not c.holds] == []

        # The disk fails: nothing can be made below the directory.
        gone = tmp_path / "gone"
        server.run.rename(gone)
        server.run.write_text("in the way")
        deadline = time.monotonic() + 60
        answers = []
        while server.status()["recording"] and time.monotonic() < deadline:
            answers.append(server.generate([1, 2, 3])["text"])
        status = server.status()
        assert status["recording"] is False
        assert "the writer stopped" in status["reason"]
        assert status["write_errors"] >= 1
        assert status["stops"]["disk"] == 1
        assert status["tries_again_in"] is not None
        refused = server.http.post("/probe/flush")
        assert refused.status_code == 503
        assert "the writer stopped" in refused.json()["reason"]
        assert server.http.get("/probe/coverage").json()["recording"] is False
        answers.append(server.generate([1, 2, 3], rid="unrecorded")["text"])

        server.run.unlink()
        gone.rename(server.run)
        while not server.status()["recording"] and time.monotonic() < deadline:
            time.sleep(0.2)
        answers.append(server.generate([1, 2, 3], rid="recorded again")["text"])
        assert len(set(answers)) == 1
        again = load_run(server.flush())
        assert [c.violation for c in verify(again) if not c.holds] == []
        assert again.requests()["rid"].tolist() == ["recorded again"]
        assert set(again.spans()["origin_rid"].dropna()) == set()  # what is reused was computed before
        stopped = load_run(server.run / "segment-00001")
        assert stopped.manifest["status"] == "incomplete"
        assert "the writer stopped" in stopped.manifest["fault"]
        assert "the writer stopped" in (server.run / "fault.txt").read_text()
        series = server.anybody.get("/metrics").text
        assert 'reason="disk"} 1.0' in series
        assert any(x.startswith("sglang_probe:recording{") and x.endswith(" 1.0") for x in series.splitlines())
    finally:
        server.kill()
