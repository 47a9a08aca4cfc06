"""Interventions that are recorded into graphs: their buffers, and what cannot be asked of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang_probe.ask import WHERE
from sglang_probe.engine.capture.graph_steering import GraphSteering
from sglang_probe.engine.hooks.instruments.accelerator import graph_rows, recording_on
from sglang_probe.errors import ConfigError
from sglang_probe.steering.spec import Spec

if TYPE_CHECKING:
    from sglang_probe.steering.apply import Bank


def graph_steering(runner: Any, bank: Bank, layers: Sequence[int], passes: int, fused: bool) -> GraphSteering:
    """Buffers with room for the largest shape that will be captured."""
    return GraphSteering(
        bank,
        layers,
        passes=passes,
        capacity=graph_rows(),
        device=runner.device,
        recording=recording_on(runner),
        fused=fused and runner.device == "cuda",
    )


def refuse_spliced(spec: Spec, where: str) -> None:
    """Refuse `splice` where interventions are recorded into graphs.

    Raises:
        ConfigError: names the entry.
    """
    if (step := next((s for s in spec.steps if s.op == "splice"), None)) is not None:
        raise ConfigError(
            f"{where}: `splice` by `{step.vector}` is not made in graphs, where every forward would pay for it",
            fix="serve it on the CPU",
        )


def refuse_more(spec: Spec, passes: int) -> None:
    """Refuse a specification that a layer has more steps of than were recorded.

    Raises:
        ConfigError: names the layer.
    """
    layers = [s.layer for s in spec.steps]
    more = next((layer for layer in layers if layers.count(layer) > passes), None)
    if more is not None:
        raise ConfigError(
            f"{WHERE}.steer: {layers.count(more)} interventions after layer {more}, and the engine's graphs have "
            f"{passes} (`steer: {{passes: ...}}` of the server)"
        )
