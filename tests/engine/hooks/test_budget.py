"""The budget of interventions: a planted slow operation on a clock of the test's own, and what becomes of requests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sglang_probe.ask import Ask
from sglang_probe.engine.hooks.instruments import steer as module
from sglang_probe.engine.hooks.instruments.budget import WINDOW, Budget
from sglang_probe.engine.hooks.instruments.steer import Steering
from sglang_probe.engine.hooks.instruments.steered import steered_of
from sglang_probe.engine.ledger.facts import BudgetEvent
from sglang_probe.steering import apply
from sglang_probe.steering.config import EXCEEDED, UNSTEERED, WITHIN, SteerConfig
from tests.end_to_end.steering import WIDTH, make_library
from tests.engine.hooks.test_steer import PROMPT, UP, Layer, Req, admitted, attached

REST = 30.0


class Clock:
    """Stands still unless an operation is slow."""

    def __init__(self) -> None:
        self.now = 100.0
        self.each = 0.0
        """Seconds that every change takes."""

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    make_library(folder)
    return folder


class Engine:
    """Decode steps of a model whose changes take as long as the clock says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, library: Path, **steer: Any) -> None:
        self.steering, self.layers = attached(monkeypatch, library, budget_ms=2.0, **steer)
        self.clock = Clock()
        assert self.steering.budget is not None
        self.steering.budget.clock = self.clock
        self.events: list[tuple[int, BudgetEvent]] = []
        self.forwards = 0
        changes = apply.changes

        def slow(*args: Any) -> Any:
            self.clock.now += self.clock.each
            return changes(*args)

        monkeypatch.setattr(apply, "changes", slow)

    def step(self, *reqs: Req, seconds: float = 0.0) -> float:
        """One decode step of these requests; returns by how much the first one's row was changed."""
        n = len(reqs)
        plan: Any = SimpleNamespace(
            starts=[PROMPT] * n,
            ends=[PROMPT + 1] * n,
            rids=[f"name {i}" for i in range(n)],
            under={},
            gates={},
            budget=[],
        )
        self.clock.each = seconds
        self.steering.launch(list(reqs), [Ask()] * n, plan)
        batch = SimpleNamespace(residual=torch.zeros(n, WIDTH), forward_mode=None)
        layer: Layer = self.layers[1]
        layer(torch.zeros(n, WIDTH), forward_batch=batch)
        self.steering.over()
        self.steering.launched()
        self.events += [(self.forwards, e) for e in plan.budget]
        self.forwards += 1
        return float(batch.residual[0].norm())

    def told(self) -> list[tuple[int, str]]:
        return [(forward, e.event) for forward, e in self.events]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, library: Path) -> Engine:
    return Engine(monkeypatch, library)


def test_a_slow_operation_exceeds_the_budget_once_most_of_the_window_is_slow(engine: Engine) -> None:
    req = admitted(steer=[UP])
    for i in range(WINDOW):  # 8 of 15, at the first moment at which the window is full
        engine.step(req, seconds=0.003 if i < 8 else 0.001)
    assert engine.told() == [(WINDOW - 1, EXCEEDED)]
    assert engine.events[0][1].milliseconds == pytest.approx(3.0)
    assert engine.events[0][1].budget_ms == 2.0


def test_hiccups_exceed_nothing(engine: Engine) -> None:
    req = admitted(steer=[UP])
    for i in range(3 * WINDOW):  # never more than 7 of 15
        engine.step(req, seconds=9.0 if i % WINDOW < 7 else 0.001)
    assert engine.told() == []
    assert admitted(steer=[UP]).refused is None


def test_forwards_without_an_intervention_cost_nothing_and_do_not_count(engine: Engine) -> None:
    steered = admitted(steer=[UP])
    for _ in range(WINDOW - 1):
        engine.step(steered, seconds=0.003)
        engine.step(admitted(), seconds=9.0)
    assert engine.told() == []


def exceed(engine: Engine) -> Req:
    req = admitted(steer=[UP])
    for _ in range(WINDOW):
        engine.step(req, seconds=0.003)
    return req


def test_new_requests_are_refused_with_the_reason_and_running_and_plain_ones_go_on(engine: Engine) -> None:
    running = exceed(engine)
    engine.clock.now += 10
    refused = str(admitted(steer=[UP]).refused)
    assert "custom_params.probe.steer: interventions cost more than 2 ms a forward" in refused
    assert "ask again in 20 seconds" in refused
    assert engine.step(running) == pytest.approx(6.0, rel=1e-4)
    plain = admitted()
    assert (plain.refused, plain.extra_key) == (None, None)
    assert admitted(steer=[{**UP, "strength": 0}]).refused is None  # which changes nothing
    assert engine.told() == [(WINDOW - 1, EXCEEDED)]


def test_off_serves_new_requests_as_plain_ones_and_the_ledger_has_each(
    monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    engine = Engine(monkeypatch, library, over_budget="off")
    running = exceed(engine)
    req = admitted(steer=[UP])
    assert (req.refused, req.extra_key, req.skip_radix_cache_insert) == (None, None, False)
    assert steered_of(req) is None
    assert engine.step(req, running) == 0.0
    assert engine.step(running, req) == pytest.approx(6.0, rel=1e-4)
    assert engine.told() == [(WINDOW - 1, EXCEEDED), (WINDOW, UNSTEERED)]
    last = engine.events[-1][1]
    asked = steered_of(running)
    assert asked is not None
    assert asked.under is not None
    assert (last.rid, last.intervention) == ("name 0", asked.under.id)


def test_interventions_are_served_again_after_the_rest_if_what_runs_costs_little(engine: Engine) -> None:
    running = exceed(engine)
    engine.clock.now += REST - 1
    assert admitted(steer=[UP]).refused is not None
    engine.clock.now += 1
    engine.step(running, seconds=0.003)  # still too much
    assert admitted(steer=[UP]).refused is not None
    for _ in range(2):
        engine.step(running, seconds=0.001)
    again = admitted(steer=[UP])
    assert again.refused is None
    engine.step(again)
    assert engine.told() == [(WINDOW - 1, EXCEEDED), (WINDOW + 3, WITHIN)]


def test_what_a_request_cost_that_has_ended_is_forgotten_after_the_rest(engine: Engine) -> None:
    running = exceed(engine)
    engine.step(running, seconds=0.003)
    engine.clock.now += REST
    assert admitted(steer=[UP]).refused is None


def test_without_a_budget_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    steering, _ = attached(monkeypatch, library)
    assert steering.budget is None
    assert steering.status() == {}


def test_the_status_says_how_it_stands(engine: Engine) -> None:
    exceed(engine)
    admitted(steer=[UP])
    told = engine.steering.status()["steering"]
    assert (told["exceeded"], told["turned_away"], told["over_budget"]) == (True, 1, "refuse")


def test_an_engine_serves_recordings_with_other_budgets(monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    steering, _ = attached(monkeypatch, library, budget_ms=2.0)
    config = steering.config
    assert config.steer is not None
    other = config.model_copy(update={"steer": config.steer.model_copy(update={"budget_ms": 1.0})})
    assert Steering.serves(config, other)
    steering.open(other, None)
    assert steering.budget is not None
    assert steering.budget.status()["budget_ms"] == 1.0
    more = config.model_copy(update={"steer": config.steer.model_copy(update={"passes": 3})})
    assert not Steering.serves(config, more)


@pytest.mark.parametrize(
    "steer",
    [
        {"budget_ms": 0},
        {"budget_ms": float("inf")},
        {"over_budget": "off"},
        {"budget_rest": 5},
        {"budget_ms": 2, "over_budget": "slow"},
        {"budget_ms": 2, "deployment": [UP]},
    ],
)
def test_budgets_that_mean_nothing_are_refused(steer: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SteerConfig.model_validate({"library": "x", **steer})


def test_a_configuration_without_a_budget_can_be_written_out_and_read() -> None:
    config = SteerConfig.model_validate({"library": "/x"})
    assert SteerConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_change_that_takes_long_is_measured_by_the_real_clock_too(
    monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    """Any operation takes longer than a picosecond."""
    steering, layers = attached(monkeypatch, library, budget_ms=1e-9)
    assert isinstance(steering.budget, Budget)
    assert module.Budget is Budget
    req = admitted(steer=[UP])
    for _ in range(WINDOW):
        steering.prepare([req], [PROMPT], [PROMPT + 1])
        layers[1](
            torch.zeros(1, WIDTH), forward_batch=SimpleNamespace(residual=torch.zeros(1, WIDTH), forward_mode=None)
        )
        steering.over()
    assert steering.budget.status()["exceeded"]
