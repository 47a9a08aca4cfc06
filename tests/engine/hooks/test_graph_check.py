"""The check of captured graphs where SGLang captures them: capture and replay are simulated on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import accelerator
from sglang_probe.engine.hooks.instruments.graph_check import GraphCheck, capture_one
from sglang_probe.engine.hooks.instruments.rows import Rows
from sglang_probe.engine.hooks.session import Session
from tests.engine.capture.graph import WIDTH, Graph
from tests.engine.made_session import make_session, set_taps

POINT = "blocks.0.hook_resid_post"
VOCABULARY = 40


class Backend:
    """`FullCudaGraphBackend`, as far as it is used: two warm-ups, a capture, and replays."""

    def __init__(self, batch: Any) -> None:
        self.batch, self.graphs = batch, dict[int, Graph]()
        self.recording = False

    def capture_one(self, key: int, forward: Any) -> None:
        forward()
        forward()
        self.graphs[key] = Graph(lambda _x: forward(), key)

    def replay(self, key: int, batch: Any) -> None:
        assert batch is self.batch
        self.graphs[key].replay(torch.empty(0, WIDTH))


class Engine:
    """One model of an embedding and a product, with static buffers for four tokens."""

    def __init__(self, running: Session, taps: GraphTaps) -> None:
        torch.manual_seed(0)
        self.table, self.matrix = torch.randn(VOCABULARY, WIDTH), torch.randn(WIDTH, WIDTH)
        self.hooks: list[Any] = []
        self.taps, self.tapped = taps, True
        model = SimpleNamespace(model=SimpleNamespace(embed_tokens=SimpleNamespace(weight=self.table)))
        self.runner = SimpleNamespace(
            model=model,
            capture_tail_hooks=self.hooks,
            model_config=SimpleNamespace(vocab_size=VOCABULARY, context_len=3),
        )
        self.batch = SimpleNamespace(
            input_ids=torch.zeros(4, dtype=torch.int64), positions=torch.zeros(4, dtype=torch.int64)
        )
        self.positions: list[list[int]] = []
        running.instruments[-1].attach(self.runner)

    def capture(self, tokens: int) -> None:
        backend = Backend(self.batch)
        capture_one(lambda b, *args: b.capture_one(*args), backend, tokens, lambda: self.forward(tokens))

    def forward(self, tokens: int) -> None:
        self.positions.append(self.batch.positions.tolist())
        x = self.table.index_select(0, self.batch.input_ids[:tokens])
        self.taps.write("hook_embed", x)
        if self.tapped:
            self.taps.write(POINT, x @ self.matrix)
        for hook in self.hooks:
            hook(None, None, self.batch, tokens)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Session:
    config = EngineProbeConfig(run=tmp_path, hook_points=["hook_embed", POINT], simulated_graphs=True)
    found = make_session(monkeypatch, config, Rows, GraphCheck, opened=False)
    monkeypatch.setattr(found, "_tell_fault", lambda _fault: None)
    return found


@pytest.fixture
def engine(running: Session) -> Engine:
    taps = GraphTaps({"hook_embed": (WIDTH, torch.float32), POINT: (WIDTH, torch.float32)}, capacity=4, device="cpu")
    set_taps(running, taps)
    return Engine(running, taps)


def test_every_captured_size_is_checked_and_told(engine: Engine, running: Session) -> None:
    for tokens in (4, 2, 1):
        engine.capture(tokens)
    assert running.fault is None
    told = running.facts()["graphs_checked"]
    assert told["sizes"] == [1, 2, 4]
    assert told["worst"] == {"hook_embed": 0.0, POINT: 0.0}
    assert [0, 1, 2, 0] in engine.positions  # of the check, within the context
    assert engine.batch.input_ids.tolist() == engine.batch.positions.tolist() == [0] * 4


def test_a_graph_without_a_tap_stops_the_engine_by_name(engine: Engine, running: Session) -> None:
    engine.tapped = False
    engine.capture(2)
    assert f"{POINT} of the graph for 2 tokens: row 0 was not written" in str(running.fault)
    engine.capture(1)  # and nothing more is asked
    assert running.facts().get("graphs_checked") is None


def test_a_graph_without_tail_hooks_is_passed_over(engine: Engine, running: Session) -> None:
    engine.capture(2)
    engine.hooks.clear()
    engine.tapped = False
    engine.capture(4)
    assert running.fault is None
    assert running.facts()["graphs_checked"]["sizes"] == [2]


def test_it_is_wanted_where_rows_leave_through_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = EngineProbeConfig(run=tmp_path, hook_points=["hook_embed"])
    assert not GraphCheck.wanted(rows)
    monkeypatch.setattr(accelerator, "accelerator_present", lambda: True)
    assert GraphCheck.wanted(rows)
    assert not GraphCheck.wanted(EngineProbeConfig(run=tmp_path, telemetry={}))
