"""Telemetry of replayed decode steps: its taps are captured before the recording opens; no Python runs at replay."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_probe.ask import Ask
from sglang_probe.engine.capture.attention_reference import attention_summary
from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.hooks import model as engine_model
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import accelerator, host_telemetry
from sglang_probe.engine.hooks.instruments.device_telemetry import AcceleratorTelemetry
from sglang_probe.engine.hooks.instruments.telemetry import AttentionTelemetry
from sglang_probe.engine.ledger.facts import ForwardPlan
from sglang_probe.errors import LedgerError, UnsupportedError
from sglang_probe.run.telemetry_options import TelemetryConfig
from tests.engine.capture.graph import WIDTH, Graph
from tests.engine.hooks.test_replay import LAYERS, LlamaForCausalLM, expected
from tests.engine.made_session import make_session

OPTIONS = TelemetryConfig(every=2, sinks=1, window=2, top_k=3)
BY_LISTS = TelemetryConfig.model_validate({"every": 2, "sinks": 1, "window": 2, "by": "lists"})
POOL = torch.randn(2, 40, 1, WIDTH, generator=torch.Generator().manual_seed(0))
TABLE = torch.randperm(40, generator=torch.Generator().manual_seed(1)).view(4, 10).int()


class Engine:
    """A model whose attention is a stand-in, and the session of a recording of telemetry alone, not opened yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.setattr(host_telemetry, "check_attention", lambda *_: None)  # no SGLang modules
        config = EngineProbeConfig(run=folder, telemetry=OPTIONS, simulated_graphs=True)
        self.session = make_session(monkeypatch, config, AttentionTelemetry, opened=False)
        self.model = LlamaForCausalLM()
        for i, layer in enumerate(self.model.model.layers):
            core = layer.self_attn.attn
            core.tp_q_head_num, core.tp_k_head_num, core.layer_id, core.scaling = 1, 1, i, 0.3
            core.logit_cap, core.sliding_window_size = 0, -1
        self.capturing = False
        self.runner = SimpleNamespace(
            is_draft_worker=False,
            req_to_token_pool=SimpleNamespace(req_to_token=TABLE.clone()),
            token_to_kv_pool=SimpleNamespace(get_key_buffer=lambda i: POOL[i]),
        )

    def install(self, options: TelemetryConfig = OPTIONS) -> AcceleratorTelemetry:
        def make_taps(columns: dict) -> GraphTaps:
            return GraphTaps(columns, capacity=8, device="cpu", recording=lambda: self.capturing)

        found = AcceleratorTelemetry(self.model.model.layers, options, make_taps, torch.float32)
        instrument = self.session.of(AttentionTelemetry)
        assert instrument is not None
        instrument.measurements = found
        return found

    def capture(self) -> Graph:
        self.model(torch.ones(8, WIDTH))  # SGLang warms up first
        self.capturing = True
        graph = Graph(self.model, 8)
        self.capturing = False
        return graph

    def forward(self, prompts: list[int], steps: list[int], run: Any, *, replayed: bool) -> ForwardPlan:
        """Decode one position of each request, as `Scheduler.run_batch` and `ModelRunner.forward` bracket it."""
        n = len(prompts)
        starts = [p + s for p, s in zip(prompts, steps, strict=True)]
        rids = [str(i) for i in range(n)]
        plan = ForwardPlan(
            1, "decode", rids, starts, [s + 1 for s in starts], [True] * n, [0] * n, prompts, [None] * n, slots=n
        )
        plan.forward_id = 7
        self.session.plan = plan
        for instrument in self.session.instruments:
            instrument.launch([], [Ask()] * n, plan)
        batch = SimpleNamespace(req_pool_indices=torch.tensor([2, 0, 3][:n]))
        output = SimpleNamespace(can_run_graph=replayed)

        def original(*_: Any) -> Any:
            run()
            # The scheduler may write it for the next forward while this one runs; so nothing may read it after it.
            self.runner.req_to_token_pool.req_to_token.fill_(0)
            return output

        self.runner.req_to_token_pool.req_to_token.copy_(TABLE)
        assert engine_model.forward(original, self.runner, batch) is output
        return plan


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    return Engine(monkeypatch, tmp_path)


def _arrived(plan: ForwardPlan) -> Any:
    (way,) = plan.travelling.values()
    way.send(torch.clone)
    way.arrive()
    return way.finish()


@pytest.mark.parametrize("options", [OPTIONS, BY_LISTS], ids=["kernel", "lists"])
def test_a_replay_gives_the_numbers_of_its_own_queries(options: TelemetryConfig, engine: Engine) -> None:
    engine.install(options)
    graph = engine.capture()
    accelerator.check_captured(None, None, None, 8)
    assert engine.session.fault is None

    engine.session.recorder = object()  # type: ignore[assignment]  # now it opens
    for first in (0.0, 3.0):
        x = torch.arange(first, first + 3 * WIDTH).view(3, WIDTH) / 10
        prompts, steps = [5, 4, 7], [2, 1, 0]  # the second is no step to be measured
        plan = engine.forward(prompts, steps, lambda x=x: graph.replay(x), replayed=True)
        assert engine.session.fault is None
        assert "rows" not in plan.travelling  # no rows were asked for
        found = _arrived(plan)
        assert (found.rids, found.positions.tolist(), found.forward_id) == (["0", "2"], [7, 7], 7)
        eager = _arrived(engine.forward(prompts, steps, lambda x=x: engine.model(x), replayed=False))
        for i in LAYERS:
            want = attention_summary(
                expected(x)[f"blocks.{i}.attn.hook_rot_q"][[0, 2], None],
                POOL[i],
                TABLE[[2, 3]],
                torch.tensor([8, 8]),
                torch.tensor([[1, 8], [1, 8]]),
                torch.tensor([0]),
                scaling=0.3,
                top_k=3,
            )
            torch.testing.assert_close(torch.from_numpy(found.numbers["support"][i]), want.entropy().exp())
            torch.testing.assert_close(torch.from_numpy(found.numbers["mass_sinks"][i]), want.mass()[..., 0])
            torch.testing.assert_close(torch.from_numpy(eager.numbers["mass_sinks"][i]), want.mass()[..., 0])
            if options.by == "kernel":
                assert found.top_positions[i].tolist() == want.top_positions.tolist()
                torch.testing.assert_close(torch.from_numpy(eager.top_weights[i]), want.top_weights)


def test_steps_that_are_not_measured_cost_nothing_outside_the_graph(engine: Engine) -> None:
    found = engine.install()
    graph = engine.capture()
    engine.session.recorder = object()  # type: ignore[assignment]
    plan = engine.forward([5], [1], lambda: graph.replay(torch.ones(1, WIDTH)), replayed=True)
    assert plan.travelling == {}
    found.taps.buffer.zero_()
    engine.forward([5], [3], lambda: engine.model(torch.ones(1, WIDTH)), replayed=False)
    assert not found.taps.buffer.any()


def test_taps_that_were_not_there_at_capture_give_no_numbers(engine: Engine) -> None:
    """Negative control, as of rows."""
    graph = engine.capture()
    engine.install()
    engine.session.recorder = object()  # type: ignore[assignment]
    _arrived(engine.forward([5], [0], lambda: engine.model(torch.ones(1, WIDTH)), replayed=False))  # plausible ones
    plan = engine.forward([5], [2], lambda: graph.replay(torch.ones(1, WIDTH)), replayed=True)
    with pytest.raises(LedgerError, match=r"blocks\.0\.attn\.hook_rot_q was not written by the graph"):
        _arrived(plan)


def test_a_graph_without_the_taps_refuses_the_engine(engine: Engine) -> None:
    engine.install()
    Graph(engine.model, 8)  # captured, and the hooks were not told so
    accelerator.check_captured(None, None, None, 8)
    assert engine.session.fault is not None
    assert "not part of the graph captured for 8 tokens" in engine.session.fault


def test_a_cache_that_is_not_by_slots_is_refused() -> None:
    by_slots = POOL[0]
    assert host_telemetry.check_keys(by_slots) is by_slots
    with pytest.raises(UnsupportedError, match=r"shape \[10, 1, 4, 6\], which is not by slots"):
        host_telemetry.check_keys(by_slots.view(10, 4, 1, WIDTH).transpose(1, 2))
    with pytest.raises(UnsupportedError, match="float8"):
        host_telemetry.check_keys(by_slots.to(torch.float8_e5m2))
