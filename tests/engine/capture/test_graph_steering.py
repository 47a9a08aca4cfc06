"""Interventions in a graph, without a GPU: the device operations are recorded and replayed without the Python around
them, and give the bits of an eager forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sglang_probe.engine.capture.graph_steering import GraphSteering
from sglang_probe.errors import LedgerError
from sglang_probe.steering.apply import Bank, Parts, intervene
from sglang_probe.steering.plan import Rows, rows_of
from tests.engine.capture.graph import WIDTH, Graph
from tests.steering.toy import NUMBERS, spec

LAYERS = (1, 2)


def bank() -> Bank:
    generator = torch.Generator().manual_seed(0)

    def random() -> torch.Tensor:
        return torch.randn(WIDTH, generator=generator)

    return Bank.of([Parts(random()), Parts(random()), Parts(random(), random(), 0.3, 0.1, random())])


class Model(nn.Module):
    """Two layers of a residual stream that is changed after each."""

    def __init__(self, steering: GraphSteering, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.steering, self.dtype, self.out = steering, dtype, torch.empty(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.to(self.dtype) * 0.5
        for layer in LAYERS:
            h = h * 1.5
            self.steering.apply(layer, h, h)
        self.out = h
        return h


def replayed(graph: Graph, model: Model, x: torch.Tensor) -> torch.Tensor:
    out = model.out
    graph.replay(x)
    return out


def eager(x: torch.Tensor, plan: dict[int, list[Rows]]) -> torch.Tensor:
    h = x * 0.5
    for layer in LAYERS:
        h = intervene(h * 1.5, plan.get(layer, []), bank())
    return h


def batch(n: int, first: float) -> torch.Tensor:
    return torch.randn((n, WIDTH), generator=torch.Generator().manual_seed(int(first)))


STEERED = [
    spec({"strength": 3}, {"vector": "late", "op": "project_out", "strength": 1}),
    spec({"vector": "f7", "op": "clamp", "strength": 2}, {"op": "cap", "strength": 0}),
    spec({"vector": "f7", "op": "ablate_feature", "strength": 1}, {"strength": -1}),
    spec({"vector": "f7", "strength": 2, "gate": {"by": "feature"}}),
]


def plan_of(specs: list[Any]) -> dict[int, list[Rows]]:
    ones = [1] * len(specs)
    return rows_of([0] * len(specs), ones, ones, specs, NUMBERS)


def make(capacity: int = 8, passes: int = 2, **options: Any) -> GraphSteering:
    return GraphSteering(bank(), LAYERS, passes=passes, capacity=capacity, device="cpu", **options)


def test_a_replay_changes_what_an_eager_forward_changes_and_nothing_else() -> None:
    steering = make()
    model = Model(steering)
    graph = Graph(model, 8)
    for first, specs in enumerate(([None, *STEERED, None], [], STEERED[::-1], [None] * 8, [STEERED[0]])):
        x, plan = batch(8, first), plan_of(specs)
        steering.load(plan, len(specs))
        assert torch.equal(replayed(graph, model, x), eager(x, plan))


def test_padding_after_the_real_rows_keeps_its_bits() -> None:
    steering = make()
    model = Model(steering)
    graph = Graph(model, 8)
    steering.load(plan_of([STEERED[0]] * 8), 8)
    replayed(graph, model, batch(8, 1))
    steering.load(plan_of([STEERED[0]] * 3), 3)
    x = batch(8, 2)
    assert torch.equal(replayed(graph, model, x)[3:], eager(x, {})[3:])


def test_a_forward_that_is_larger_than_the_buffer_has_memory_of_its_own_and_leaves_none() -> None:
    steering = make(capacity=4)
    model = Model(steering)
    plan = plan_of([None, *STEERED, None])
    steering.load(plan, 6)
    x = batch(6, 3)
    assert torch.equal(model(x), eager(x, plan))
    steering.load({}, 2)
    assert torch.equal(model(x[:2]), eager(x[:2], {}))


def test_bf16_is_rounded_as_in_an_eager_forward() -> None:
    steering = make()
    model = Model(steering, torch.bfloat16)
    graph = Graph(model, 4)
    plan = plan_of(STEERED)
    steering.load(plan, 4)
    x = batch(4, 5).bfloat16()
    assert torch.equal(replayed(graph, model, x), eager(x, plan))


def test_more_passes_than_were_recorded_and_graphs_beyond_the_buffer_are_refused() -> None:
    with pytest.raises(LedgerError, match="layer 1 has 3 passes, and 2 are recorded"):
        make().load(plan_of([spec({}, {"strength": 1}, {"strength": 3})]), 1)
    with pytest.raises(LedgerError, match="room for 4"):
        Model(make(capacity=4, recording=lambda: True))(batch(5, 0))
