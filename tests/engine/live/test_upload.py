"""Segments are copied while a server records, and a target that is down is none of the server's business."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_probe.remote.download import download
from sglang_probe.remote.target import Target
from sglang_probe.run.manifest import MANIFEST
from tests.engine.live.conftest import FakeEngine, checked, violations

pytest.importorskip("fsspec")
A = [1, 2, 3, 4]


def test_segments_arrive_while_the_server_records_and_the_last_one_after_its_end(
    make_engine: Callable[..., FakeEngine], wait: Callable[..., None], tmp_path: Path
) -> None:
    there = Target(f"file://{tmp_path}/there")
    engine = make_engine(rows=True, privacy="ids", upload={"to": there.url, "patience": 30})
    engine.serve("a", A)
    closed = engine.flush()
    wait(lambda: f"{closed.name}/{MANIFEST}" in there.sizes(), 120)
    engine.serve("b", A)
    wait(lambda: "segment-00001/journal.jsonl" in there.sizes(), 120)
    engine.live.close()
    assert engine.live._keeper._upload is not None
    assert engine.live._keeper._upload._process.wait(120) == 0
    assert engine.live.status()["upload"]["done"]
    assert download(there, tmp_path / "back") == {"segment-00000": "complete", "segment-00001": "complete"}
    assert violations(checked(tmp_path / "back" / "segment-00000")[1]) == []


def test_a_target_that_is_down_is_in_the_status_and_the_recording_goes_on(
    make_engine: Callable[..., FakeEngine], wait: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "a-file").write_text("")
    engine = make_engine(upload={"to": f"file://{tmp_path}/a-file/there", "patience": 0.1})
    engine.serve("a", A)
    engine.flush()
    wait(lambda: engine.live.status()["upload"]["error"] is not None, 120)
    told = engine.live.status()
    assert told["recording"]
    assert told["upload"]["waiting"] > 0
    engine.serve("b", A)
    assert checked(engine.flush())[0].complete
