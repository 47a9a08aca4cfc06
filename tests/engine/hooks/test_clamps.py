"""A server's clamps in the instrument: the gate says on whom, and nobody else is touched in any bit."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

from sglang_probe.engine.hooks.instruments.steered import steered_of
from sglang_probe.engine.hooks.requests import read_limit
from sglang_probe.errors import UnsupportedError
from tests.engine.hooks.test_gates import Engine
from tests.engine.hooks.test_steer import PROMPT, UP, Req, admitted, attached
from tests.steering.clamped import make_clamp
from tests.steering.test_clamps import make_library


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_library(tmp_path / "library")
    return tmp_path


def engine_of(monkeypatch: pytest.MonkeyPatch, folder: Path, **steer: Any) -> Engine:
    clamps = [{**make_clamp(folder), "probe": "fires"}]
    return Engine(*attached(monkeypatch, folder / "library", clamps=clamps, **steer), folder / "library")


@pytest.mark.parametrize(("score", "opened"), [(0.5, True), (-0.5, False)])
def test_the_gate_decides_who_is_clamped_and_the_cache_is_everybodys_until_then(
    monkeypatch: pytest.MonkeyPatch, folder: Path, score: float, opened: bool
) -> None:
    engine = engine_of(monkeypatch, folder)
    req = admitted()
    assert (req.refused, req.extra_key, req.skip_radix_cache_insert) == (None, None, False)
    first, changed = engine.forward((req, 0, PROMPT, score))
    assert changed.tolist() == [0.0] * PROMPT  # the prompt is plain in any case
    assert first.gates[0].opened is opened
    assert req.skip_radix_cache_insert is opened
    later, changed = engine.forward((req, PROMPT, PROMPT + 1, 0.0))
    assert bool(changed[0] > 1) is opened
    assert ({i: u.onset for i, u in later.under.items()} == {0: PROMPT}) is opened
    assert read_limit(req) == PROMPT
    assert engine.steering.status()["clamps"]["opened"] == int(opened)
    if not opened:
        assert engine.steering.passes == {}
        assert engine.steering.changed == 0


def test_a_prompt_that_sglang_cuts_waits_for_the_row_that_it_has_then(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    engine = engine_of(monkeypatch, folder)
    req = admitted()
    req.origin_input_ids = req.origin_input_ids[:6]
    plan, _ = engine.forward((req, 0, 6, 0.5))
    assert req.to_finish is None
    assert (plan.gates[0].position, plan.gates[0].opened) == (5, True)


def test_a_plain_request_whose_gate_was_not_decided_in_time_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    schedule_batch: Any = ModuleType("schedule_batch")
    schedule_batch.FINISH_ABORT = lambda message: ("abort", message)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.schedule_batch", schedule_batch)
    engine = engine_of(monkeypatch, folder)
    late = admitted()
    asked = admitted(steer=[{**UP, "phases": ["decode"], "gate": {"by": "probe", "probe": "fires"}}])
    # The forward of the prompts' last rows was not prepared.
    pieces = [(req, PROMPT, PROMPT + 1, 0.0) for req in (late, asked)]
    plan, changed = engine.forward(*pieces)
    assert (late.to_finish, steered_of(late), changed[0].item()) == (None, None, 0.0)
    assert plan.gates == {}
    assert asked.to_finish is not None  # half of what it asked is none
    engine.forward((late, PROMPT + 1, PROMPT + 2, 0.0))
    assert engine.steering.status()["clamps"]["missed"] == 1


def test_what_a_request_asks_for_itself_is_done_beside_and_another_gate_is_refused(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    engine = engine_of(monkeypatch, folder)
    both = admitted(steer=[{**UP, "phases": ["decode"]}])
    assert both.skip_radix_cache_insert is True
    engine.forward((both, 0, PROMPT, -0.5))
    _, changed = engine.forward((both, PROMPT, PROMPT + 1, 0.0))
    assert changed.tolist() == pytest.approx([6.0], rel=1e-4)
    same = admitted(steer=[{**UP, "phases": ["decode"], "gate": {"by": "probe", "probe": "fires"}}])
    assert same.refused is None


@pytest.mark.parametrize("action", ["refuse", "off"])
def test_a_clamp_of_the_server_is_under_no_budget_that_one_client_could_use_up(
    monkeypatch: pytest.MonkeyPatch, folder: Path, action: str
) -> None:
    with pytest.raises(ValidationError, match="`clamps` are the server's own, whatever they cost"):
        engine_of(monkeypatch, folder, budget_ms=2.0, over_budget=action)


def test_a_change_that_fails_ends_those_that_it_was_for_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    schedule_batch: Any = ModuleType("schedule_batch")
    schedule_batch.FINISH_ABORT = lambda message: ("abort", message)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.schedule_batch", schedule_batch)
    engine = engine_of(monkeypatch, folder)
    inside, outside, waiting = admitted(), admitted(), admitted()
    engine.forward((inside, 0, PROMPT, 0.5), (outside, 0, PROMPT, -0.5))
    engine.steering.broken(RuntimeError("planted"))
    assert inside.to_finish is not None
    assert (outside.to_finish, waiting.to_finish) == (None, None)
    assert steered_of(outside) is None
    later: Req = admitted()
    assert (later.refused, steered_of(later)) == (None, None)
    assert "planted" in engine.steering.status()["clamps"]["off"]


def test_without_a_gate_that_can_be_decided_the_server_does_not_start(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    clamps = [{**make_clamp(folder), "probe": "fires"}]
    with pytest.raises(UnsupportedError, match="wait for a gate"):
        attached(monkeypatch, folder / "library", tp_size=2, clamps=clamps)
