"""A simulated graph with the taps in it passes; each way in which a replay can be wrong is named with its row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sglang_probe.engine.capture import graph_check
from sglang_probe.engine.capture.graph_check import GraphFigures, check_graph
from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.errors import LedgerError
from tests.engine.capture.graph import WIDTH, Graph

VOCABULARY, TOKENS, POINT = 40, 5, "blocks.0.hook_resid_post"
torch.manual_seed(0)
EMBEDDING = torch.randn(VOCABULARY, WIDTH)
MATRIX = torch.randn(WIDTH, WIDTH)

Sabotage = Callable[[GraphTaps, torch.Tensor], None]


def found(sabotage: Sabotage | None = None, *, again: Sabotage | None = None) -> GraphFigures:
    """The check of one graph of a model with two hook points.

    Args:
        sabotage: in place of the tap of the residual, where the graph is captured. again: after each replay.
    """
    taps = GraphTaps({"hook_embed": (WIDTH, torch.float32), POINT: (WIDTH, torch.float32)}, capacity=8, device="cpu")

    def forward(x: torch.Tensor, tap: Sabotage | None = None) -> None:
        taps.write("hook_embed", x)
        h = x @ MATRIX
        if tap is None:
            taps.write(POINT, h)
        else:
            tap(taps, h)

    graph = Graph(lambda x: forward(x, sabotage), TOKENS)

    def replay(ids: torch.Tensor) -> None:
        graph.replay(EMBEDDING[ids])
        if again is not None:
            again(taps, EMBEDDING[ids])

    return check_graph(
        taps,
        TOKENS,
        replay=replay,
        eager=lambda ids: forward(EMBEDDING[ids]),
        vocabulary=VOCABULARY,
        embedding_VD=EMBEDDING,
    )


def test_a_graph_with_every_tap_passes_and_is_the_eager_forward() -> None:
    assert found() == GraphFigures(TOKENS, {"hook_embed": 0.0, POINT: 0.0}, {"hook_embed": 1.0, POINT: 1.0})


def write_four(taps: GraphTaps, h: torch.Tensor) -> None:
    taps.columns[POINT].of(taps.buffer)[: TOKENS - 1].copy_(h[:-1])


def write_half_of_a_row(taps: GraphTaps, h: torch.Tensor) -> None:
    taps.columns[POINT].of(taps.buffer)[:TOKENS, : WIDTH // 2].copy_(h[:, : WIDTH // 2])


def write_one_more(taps: GraphTaps, h: torch.Tensor) -> None:
    taps.columns[POINT].of(taps.buffer)[: TOKENS + 1].copy_(torch.cat([h, h[:1]]))


def shift(taps: GraphTaps, h: torch.Tensor) -> None:
    taps.write(POINT, h.roll(1, 0))


CONSTANT = torch.randn(TOKENS, WIDTH)


@pytest.mark.parametrize(
    ("sabotage", "said"),
    [
        (lambda taps, h: None, "row 0 was not written"),
        (write_four, "row 4 was not written"),
        (write_half_of_a_row, "row 0 was not written"),
        (write_one_more, "row 5 was written too"),
        (shift, r"row \d is wrong, it differs from the eager forward by"),
        (lambda taps, h: taps.write(POINT, CONSTANT), r"row \d is wrong, it is that of the replay before"),
    ],
    ids=["left out", "a row missing", "half of it missing", "the neighbour's", "shifted", "baked in"],
)
def test_a_tap_that_is_wrong_in_the_graph_is_named(sabotage: Sabotage, said: str) -> None:
    with pytest.raises(LedgerError, match=f"{POINT} of the graph for 5 tokens: {said}"):
        found(sabotage)


def test_rows_are_compared_in_parts_and_named_by_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_check, "_ROWS", 2)
    assert found() == GraphFigures(TOKENS, {"hook_embed": 0.0, POINT: 0.0}, {"hook_embed": 1.0, POINT: 1.0})

    def last(taps: GraphTaps, _x: torch.Tensor) -> None:
        taps.columns[POINT].of(taps.buffer)[TOKENS - 1].mul_(2)

    with pytest.raises(LedgerError, match=f"{POINT} of the graph for 5 tokens: row 4 is wrong"):
        found(again=last)

    def exchange(taps: GraphTaps, _x: torch.Tensor) -> None:
        rows = taps.columns["hook_embed"].of(taps.buffer)
        rows[3:5] = rows[3:5].flip(0)

    with pytest.raises(LedgerError, match="row 3 is not the embedding"):
        found(again=exchange)


def test_rows_of_the_embedding_that_are_exchanged_are_named() -> None:
    def exchange(taps: GraphTaps, _x: torch.Tensor) -> None:
        rows = taps.columns["hook_embed"].of(taps.buffer)
        rows[1:3] = rows[1:3].flip(0)

    with pytest.raises(LedgerError, match="hook_embed of the graph for 5 tokens: row 1 is not the embedding"):
        found(again=exchange)


def test_rounding_is_no_fault_and_is_told() -> None:
    def round_off(taps: GraphTaps, _x: torch.Tensor) -> None:
        taps.columns[POINT].of(taps.buffer)[:TOKENS].mul_(1 + 1e-4)

    figures = found(again=round_off)
    assert 5e-5 < figures.worst[POINT] < 2e-4
    assert figures.equal == {"hook_embed": 1.0, POINT: 0.0}
