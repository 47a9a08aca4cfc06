"""A trace has every forward pass, and every request's computed and reused positions with their causes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_probe.cli import app
from sglang_probe.errors import ConfigError
from sglang_probe.export.perfetto import REQUESTS, export_perfetto
from sglang_probe.run.run import Run
from tests.small_cache import SmallCache


@pytest.fixture
def run(tmp_path: Path) -> Run:
    cache = SmallCache(tmp_path / "run")
    cache.serve("a", list(range(100)))
    cache.serve("b", list(range(100)))
    return cache.close()


def test_forwards_and_requests_are_there(run: Run, tmp_path: Path) -> None:
    n = export_perfetto(run, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert len(events) == n
    slices = [e for e in events if e["ph"] == "X"]
    assert [e["args"]["prefill_tokens"] for e in slices if e["name"] == "extend"] == [100, 1]
    of_requests = {e["name"]: e["args"] for e in slices if e["pid"] == REQUESTS}
    assert of_requests["prefill 100"]["never seen"] == 100
    assert of_requests["prefill 1"]["last token"] == 1
    (reused,) = [e for e in events if e["ph"] == "i"]
    assert (reused["name"], reused["args"]["of"]) == ("reused 99", "a")


def test_a_time_without_forwards_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no forward pass"):
        export_perfetto(run, tmp_path / "trace.json", first=1e6)
    assert not (tmp_path / "trace.json").exists()


def test_the_command_says_where_to_open_it(run: Run, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", "perfetto", str(run.path), "--output", str(tmp_path / "t.json")])
    assert done.exit_code == 0, done.output
    assert "ui.perfetto.dev" in done.output
