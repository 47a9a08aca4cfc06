"""Attention telemetry of decode steps, measured while requests are served.

`host_telemetry.py` reads its numbers at once, on the reference platform; `device_telemetry.py` never waits for the
device. Both say which steps they measure in the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang_probe.ask import Ask
from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.accelerator import check_model, check_recorded, make_taps
from sglang_probe.engine.hooks.instruments.base import Forward, Instrument
from sglang_probe.engine.hooks.instruments.device_telemetry import AcceleratorTelemetry
from sglang_probe.engine.hooks.instruments.host_telemetry import EngineTelemetry
from sglang_probe.run.telemetry_options import check_lists

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.config import EngineProbeConfig
    from sglang_probe.engine.ledger.facts import ForwardPlan


class AttentionTelemetry(Instrument):
    """See the module. Requests say by `system` where their system prompt lies."""

    name = "telemetry"
    field = "system"
    features = ("rows", "attention rows", "telemetry")
    in_model = True
    measurements: EngineTelemetry | AcceleratorTelemetry | None = None
    """Set once the model is loaded."""

    @classmethod
    def wanted(cls, config: EngineProbeConfig) -> bool:
        return config.telemetry is not None

    @classmethod
    def serves(cls, started: EngineProbeConfig, asked: EngineProbeConfig) -> bool:
        return started.telemetry == asked.telemetry

    def attach(self, runner: Any) -> None:
        check_model(runner, self.config)
        assert self.config.telemetry is not None
        check_lists(self.config.telemetry, in_graphs=guard.active().in_graphs)
        asked = runner.model.model.layers, self.config.telemetry
        self.measurements = (
            AcceleratorTelemetry(*asked, functools.partial(make_taps, runner), runner.dtype)
            if guard.active().in_graphs
            else EngineTelemetry(*asked)
        )

    def check_captured(self, num_tokens: int) -> None:
        if self.measurements is not None and isinstance(self.measurements.taps, GraphTaps):
            check_recorded(self.measurements.taps, num_tokens)

    def open(self, config: EngineProbeConfig, scheduler: Any) -> None:
        super().open(config, scheduler)
        if self.measurements is not None:
            self.measurements.restart()

    def launch(self, reqs: Sequence[Any], asks: Sequence[Ask], plan: ForwardPlan) -> None:
        if self.measurements is not None:
            self.measurements.launch(asks, plan)

    def before(self, forward: Forward) -> None:
        if self.measurements is not None and forward.plan is not None:
            self.measurements.prepare(forward.runner, forward.batch, forward.plan)

    def after(self, forward: Forward) -> None:
        if self.measurements is not None and forward.plan is not None:
            self.measurements.measure(forward.runner, forward.batch, forward.plan, replayed=forward.replayed)

    def end(self, rid: str) -> None:
        if self.measurements is not None:
            self.measurements.end(rid)

    def facts(self) -> dict[str, Any]:
        return {"telemetry_layers": [] if self.measurements is None else self.measurements.layers}
