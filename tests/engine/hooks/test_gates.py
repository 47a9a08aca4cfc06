"""Gates by a probe in the instrument: which row decides, when, and what the forwards after it do."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks.instruments.steer import Steering
from sglang_probe.engine.hooks.instruments.steered import steered_of
from sglang_probe.engine.hooks.requests import read_limit
from sglang_probe.engine.ledger.facts import Decision
from sglang_probe.steering.library import Library
from tests.end_to_end.steering import WIDTH, make_library
from tests.engine.hooks.test_steer import PROMPT, UP, Layer, Req, admitted, attached

GATED: dict[str, Any] = {**UP, "phases": ["decode"], "gate": {"by": "probe", "probe": "fires"}}
LAYER = 2  # of the probe; `up` acts after layer 1


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    make_library(folder)
    return folder


class Engine:
    """Forwards of a model of four layers, whose residual stream is what the test says."""

    def __init__(self, steering: Steering, layers: list[Layer], folder: Path) -> None:
        self.steering, self.layers, self.forwards = steering, layers, 0
        self.w = Library.open(folder)["fires"].vector

    def row(self, score: float) -> torch.Tensor:
        """A row of this score. The threshold is 0."""
        return self.w * (score / float(self.w @ self.w))

    def forward(self, *pieces: tuple[Req, int, int, float], recorded: bool = True) -> Any:
        """Compute positions `[start, end)` of requests; the last row of each has this score. Returns the plan and the
        residual stream after layer 1."""
        reqs = [p[0] for p in pieces]
        plan: Any = SimpleNamespace(
            starts=[p[1] for p in pieces],
            ends=[p[2] for p in pieces],
            attempts=[0] * len(pieces),
            rids=[p[0].rid for p in pieces],
            budget=[],
            forward_id=self.forwards,
            under={},
            gates={},
        )
        x = torch.zeros(sum(p[2] - p[1] for p in pieces), WIDTH)
        at = 0
        for _, start, end, score in pieces:
            at += end - start
            x[at - 1] = self.row(score)
        if recorded:
            self.steering.launch(reqs, [Ask()] * len(reqs), plan)
        else:
            self.steering.prepare(reqs, plan.starts, plan.ends)
        after_1 = SimpleNamespace(residual=torch.zeros_like(x), forward_mode=None)
        self.layers[1](torch.zeros_like(x), forward_batch=after_1)
        self.layers[LAYER](x, forward_batch=SimpleNamespace(residual=torch.zeros_like(x), forward_mode=None))
        self.steering.launched()
        self.forwards += 1
        return plan, after_1.residual.norm(dim=1)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, library: Path) -> Engine:
    schedule_batch: Any = ModuleType("schedule_batch")
    schedule_batch.FINISH_ABORT = lambda message: ("abort", message)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.schedule_batch", schedule_batch)
    return Engine(*attached(monkeypatch, library), library)


def decision(req: Req) -> Decision | None:
    steered = steered_of(req)
    assert steered is not None
    assert steered.gate is not None
    return steered.gate.decision


@pytest.mark.parametrize(("score", "opened"), [(0.5, True), (-0.5, False)])
def test_the_prompts_last_row_decides_for_every_generated_token(engine: Engine, score: float, opened: bool) -> None:
    req, plain = admitted(steer=[GATED]), admitted()
    first, _ = engine.forward((req, 0, 10, 9.0), (plain, 0, 4, 9.0))  # a chunk that ends before
    assert first.gates == {}
    assert decision(req) is None
    second, changed = engine.forward((plain, 4, 5, 9.0), (req, 10, PROMPT, score))
    assert changed.tolist() == [0.0] * 7
    assert set(second.gates) == {1}
    found = second.gates[1]
    assert found is decision(req)
    assert (found.opened, found.position, found.forward_id) == (opened, PROMPT - 1, 1)
    assert abs(found.score - score) < 1e-6
    for position in (PROMPT, PROMPT + 1):
        later, changed = engine.forward((req, position, position + 1, -score))
        assert changed.tolist() == pytest.approx([6.0 if opened else 0.0], rel=1e-4)
        assert later.gates == {0: found}
        assert {i: u.onset for i, u in later.under.items()} == ({0: PROMPT} if opened else {})


def test_a_gated_request_is_private_and_may_reuse_its_prompt(engine: Engine) -> None:
    req = admitted(steer=[GATED])
    assert (req.extra_key, req.skip_radix_cache_insert, read_limit(req)) == (None, True, PROMPT)


def test_a_retracted_request_keeps_its_decision(engine: Engine) -> None:
    """It computes prompt and output again in one forward, whose last row says something else."""
    req = admitted(steer=[GATED])
    engine.forward((req, 0, PROMPT, 0.5))
    found = decision(req)
    plan, changed = engine.forward((req, 0, PROMPT + 2, -7.0))
    assert decision(req) is found
    assert plan.gates == {0: found}
    assert changed.tolist() == pytest.approx([0.0] * PROMPT + [6.0] * 2, rel=1e-4)


def test_what_has_no_gate_is_done_and_marked_from_the_start(engine: Engine) -> None:
    early = {**UP, "phases": ["prefill"], "prompt_window": [10, None]}
    req = admitted(steer=[early, GATED])
    plan, changed = engine.forward((req, 0, PROMPT, -0.5))
    assert changed.tolist() == pytest.approx([0.0] * 10 + [6.0] * 6, rel=1e-4)
    assert plan.under[0].onset == 10
    later, changed = engine.forward((req, PROMPT, PROMPT + 1, 0.0))
    assert changed.tolist() == [0.0]
    assert later.under[0] == plan.under[0]


def test_where_a_mark_begins_is_not_said_before_the_gate_is_decided(engine: Engine) -> None:
    late = {**UP, "phases": ["decode"], "generation_window": [3, None]}
    for score, onset in ((0.5, PROMPT), (-0.5, PROMPT + 2)):
        req = admitted(steer=[late, GATED])
        plan, _ = engine.forward((req, 0, PROMPT, score))
        assert plan.under == {}
        later, _ = engine.forward((req, PROMPT, PROMPT + 1, 0.0))
        assert later.under[0].onset == onset


def test_a_score_is_the_same_whatever_else_is_in_the_forward(engine: Engine) -> None:
    alone, together = admitted(steer=[GATED]), admitted(steer=[GATED])
    engine.forward((alone, 0, PROMPT, 0.123))
    others = [(admitted(steer=[GATED]), 0, PROMPT, 0.1 * i) for i in range(5)]
    engine.forward(*others, (together, 0, PROMPT, 0.123))
    one, other = decision(alone), decision(together)
    assert one is not None
    assert other is not None
    assert one.score == other.score


def test_a_forward_that_nobody_records_decides_all_the_same(engine: Engine) -> None:
    req = admitted(steer=[GATED])
    engine.forward((req, 0, PROMPT, 0.5), recorded=False)
    found = decision(req)
    assert found is not None
    assert (found.opened, found.forward_id) == (True, -1)


def test_a_request_whose_gate_was_not_decided_in_time_ends_and_others_go_on(engine: Engine) -> None:
    req, other = admitted(steer=[GATED]), admitted(steer=[UP])
    _, changed = engine.forward((req, PROMPT, PROMPT + 1, 0.0), (other, 0, 2, 0.0))
    assert changed.tolist() == pytest.approx([0.0, 6.0, 6.0], rel=1e-4)
    assert "its gate was not decided before the tokens that wait for it" in req.to_finish[1]
    assert other.to_finish is None


def test_a_gate_is_refused_where_graphs_replay_and_under_a_deployment(
    monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    attached(monkeypatch, library, graphs=True)
    assert "this engine runs on an accelerator" in str(admitted(steer=[GATED]).refused)
    attached(monkeypatch, library, deployment=[{**UP, "op": "cap"}])
    assert "cannot be had of a server that steers every request" in str(admitted(steer=[GATED]).refused)
