"""Taps in a graph, without a GPU: the device operations are recorded and replayed without the Python around them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sglang_probe.engine.capture.graph_taps import GraphTaps, Snapshot
from sglang_probe.errors import LedgerError
from tests.engine.capture.graph import WIDTH, Graph

COLUMNS = {
    "early": (WIDTH, torch.bfloat16),
    "late": (WIDTH, torch.float32),
    "odd": (3, torch.bfloat16),  # its rows end in the middle of an alignment unit
}


class Model(nn.Module):
    """`late` reads what an operation in place has made of the tensor that `early` saw."""

    def __init__(self, taps: GraphTaps, *, skip: Iterable[str] = ()) -> None:
        super().__init__()
        self.taps, self.skip, self.hooks_run = taps, set(skip), 0

    def tap(self, name: str, x: torch.Tensor) -> None:
        self.hooks_run += 1
        if name not in self.skip:
            self.taps.write(name, x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = (x * 2).to(torch.bfloat16)
        self.tap("early", h)
        h.add_(1)
        self.tap("odd", h[:, :3] * 10)
        out = h.float() * 3
        self.tap("late", out)
        return out


def expected(x: torch.Tensor) -> dict[str, torch.Tensor]:
    h = (x * 2).to(torch.bfloat16)
    return {"early": h, "odd": (h + 1)[:, :3] * 10, "late": (h + 1).float() * 3}


def make(capacity: int = 8, **options: Any) -> GraphTaps:
    return GraphTaps(COLUMNS, capacity=capacity, device="cpu", **options)


def batch(n: int, first: float) -> torch.Tensor:
    return torch.arange(first, first + n * WIDTH).view(n, WIDTH)


def arrived(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    snapshot.send(torch.clone)
    snapshot.arrive()
    return snapshot.finish()


def assert_rows(rows: dict[str, torch.Tensor], x: torch.Tensor) -> None:
    assert rows.keys() == COLUMNS.keys()
    for name, reference in expected(x).items():
        assert torch.equal(rows[name], reference), name


@pytest.mark.parametrize("real", [1, 3, 8])
def test_a_replay_gives_the_rows_of_its_own_batch_without_the_padding(real: int) -> None:
    taps = make()
    model = Model(taps)
    graph = Graph(model, 8)
    hooks_run = model.hooks_run
    for first in (0.0, 100.0):
        taps.arm()
        graph.replay(batch(real, first))
        snapshot = taps.snapshot(real, replayed=True)
        assert snapshot._on_device is not None
        assert len(snapshot._on_device) == real  # nothing of the padding is even copied
        assert_rows(arrived(snapshot), batch(real, first))
    assert model.hooks_run == hooks_run


def test_graphs_of_several_sizes_share_the_buffer() -> None:
    taps = make()
    graphs = {n: Graph(Model(taps), n) for n in (2, 4, 8)}
    for n, real in ((8, 7), (2, 1), (4, 4), (8, 5), (2, 2)):
        taps.arm()
        graphs[n].replay(batch(real, 10.0 * real))
        assert_rows(arrived(taps.snapshot(real, replayed=True)), batch(real, 10.0 * real))


def test_eager_forwards_between_replays() -> None:
    taps = make()
    model = Model(taps)
    graph = Graph(model, 8)
    for i in range(3):
        x = batch(5, 7.0 * i)
        taps.arm()
        graph.replay(x)
        assert_rows(arrived(taps.snapshot(5, replayed=True)), x)
        taps.arm()
        model(x + 1)
        assert_rows(arrived(taps.snapshot(5, replayed=False)), x + 1)


def test_an_eager_forward_larger_than_the_buffer_leaves_the_graphs_theirs() -> None:
    taps = make()
    model = Model(taps)
    graph, address = Graph(model, 8), taps.buffer.data_ptr()
    taps.arm()
    model(batch(100, 0.0))
    large = taps.snapshot(100, replayed=False)
    taps.arm()
    graph.replay(batch(2, 50.0))
    assert_rows(arrived(taps.snapshot(2, replayed=True)), batch(2, 50.0))
    assert_rows(arrived(large), batch(100, 0.0))
    assert taps.buffer.data_ptr() == address


def test_a_large_forward_that_nobody_records_keeps_no_memory() -> None:
    """SGLang warms up with forwards larger than any graph, before the recording opens."""
    taps = make()
    Model(taps)(batch(100, 0.0))
    assert taps._large is None


def test_a_graph_larger_than_the_buffer_is_refused_when_it_is_captured() -> None:
    with pytest.raises(LedgerError, match="a graph of 9 tokens is being captured; the taps have room for 8"):
        Graph(Model(make(recording=lambda: True)), 9)


def test_two_forwards_in_flight_keep_their_own_rows() -> None:
    """Overlap scheduling: the second replay is launched before the rows of the first are read on the host."""
    taps = make()
    graph = Graph(Model(taps), 8)
    in_flight = []
    for first in (0.0, 100.0):
        taps.arm()
        graph.replay(batch(4, first))
        snapshot = taps.snapshot(4, replayed=True)
        in_flight.append(snapshot)
    for snapshot, first in zip(in_flight, (0.0, 100.0), strict=True):
        assert_rows(arrived(snapshot), batch(4, first))


def test_a_single_buffer_would_mix_two_forwards_in_flight() -> None:
    """Negative control of the one above: read the recorded buffer itself when the result is processed."""
    taps = make()
    graph = Graph(Model(taps), 8)
    in_flight = []
    for first in (0.0, 100.0):
        taps.arm()
        graph.replay(batch(4, first))
        in_flight.append(Snapshot(taps.buffer[:4], taps.columns, replayed=True, index=np.arange(4), selected={}))
    with pytest.raises(AssertionError):
        assert_rows(arrived(in_flight[0]), batch(4, 0.0))


def test_a_tap_that_is_missing_from_the_graph_is_noticed_at_capture() -> None:
    taps = make()
    Graph(Model(taps, skip=["odd"]), 8)
    with pytest.raises(LedgerError, match="odd is not part of the graph captured for 8 tokens"):
        taps.check_recorded(8)


def test_a_complete_graph_passes_and_the_next_capture_starts_anew() -> None:
    taps = make()
    for n in (8, 4):
        Graph(Model(taps), n)
        taps.check_recorded(n)
    with pytest.raises(LedgerError, match="early is not part"):
        taps.check_recorded(4)


def test_a_tap_that_is_missing_from_a_graph_is_noticed_at_replay_and_gives_no_stale_rows() -> None:
    taps = make()
    Model(taps)(batch(8, 3.0))  # plausible rows of another forward lie in the buffer
    graph = Graph(Model(taps, skip=["odd"]), 8)
    taps.arm()
    graph.replay(batch(4, 0.0))
    with pytest.raises(LedgerError, match="odd was not written by the graph that was replayed"):
        arrived(taps.snapshot(4, replayed=True))


def test_a_tap_that_does_not_fire_in_an_eager_forward_is_noticed() -> None:
    taps = make()
    taps.arm()
    Model(taps, skip=["late"])(batch(4, 0.0))
    with pytest.raises(LedgerError, match="late saw 0 rows in a forward of 4 tokens"):
        taps.snapshot(4, replayed=False)


def test_padding_in_an_eager_forward_is_not_taken_for_rows() -> None:
    taps = make()
    taps.arm()
    Model(taps)(batch(8, 0.0))
    with pytest.raises(LedgerError, match="early saw 8 rows in a forward of 5 tokens"):
        taps.snapshot(5, replayed=False)


@pytest.mark.parametrize("others", [[2, 3], []])
def test_tokens_that_no_hook_point_selects_stay_on_the_device(others: list[int]) -> None:
    taps = make()
    graph = Graph(Model(taps), 8)
    none = np.array([], dtype=np.int64)
    selected = {"early": np.array([3, 5]), "late": np.array(others, dtype=np.int64), "odd": none}
    taps.arm()
    graph.replay(batch(7, 0.0))
    snapshot = taps.snapshot(7, replayed=True, selected=selected)
    assert snapshot._on_device is not None
    assert len(snapshot._on_device) == len({0, 3, 5, *others})  # the first shows that the taps were written
    rows = arrived(snapshot)
    assert set(rows) == {"early", "late"} if others else {"early"}
    for name, x in rows.items():
        assert torch.equal(x, expected(batch(7, 0.0))[name][selected[name]])


def test_one_hook_point_that_selects_all_makes_all_travel() -> None:
    taps = make()
    taps.arm()
    Model(taps)(batch(5, 0.0))
    rows = arrived(taps.snapshot(5, replayed=False, selected={"early": np.array([1]), "odd": np.array([0, 4])}))
    reference = expected(batch(5, 0.0))
    assert torch.equal(rows["late"], reference["late"])
    assert torch.equal(rows["early"], reference["early"][[1]])
    assert torch.equal(rows["odd"], reference["odd"][[0, 4]])


def test_parts_of_a_row_are_chosen_inside_the_graph() -> None:
    columns = {"h": (2, torch.float32)}
    taps = GraphTaps(columns, capacity=4, device="cpu", parts={"h": torch.tensor([1, 4])})
    graph = Graph(lambda x: taps.write("h", x), 4)
    taps.arm()
    graph.replay(batch(3, 0.0))
    assert torch.equal(arrived(taps.snapshot(3, replayed=True))["h"], batch(3, 0.0)[:, [1, 4]])


@pytest.mark.parametrize("probes", [1, 3])
def test_scores_are_computed_inside_the_graph(probes: int) -> None:
    """In fp32 from a bf16 row; a column of one probe is narrower than the marks, and is noticed all the same."""
    w = torch.randn(WIDTH, probes, generator=torch.Generator().manual_seed(0))
    columns = {"h": (WIDTH, torch.bfloat16), "scores": (probes, torch.float32)}
    taps = GraphTaps(columns, capacity=4, device="cpu", weights={"scores": w})

    def run(x: torch.Tensor, skip: str = "") -> None:
        for name in columns.keys() - {skip}:
            taps.write(name, x.to(torch.bfloat16))

    graph, without = Graph(run, 4), Graph(lambda x: run(x, skip="scores"), 4)
    for first in (0.0, 10.3):
        taps.arm()
        graph.replay(batch(3, first))
        rows = arrived(taps.snapshot(3, replayed=True))
        assert rows["scores"].dtype == torch.float32
        torch.testing.assert_close(rows["scores"], rows["h"].float() @ w, rtol=1e-6, atol=1e-5)
    taps.arm()
    without.replay(batch(3, 0.0))
    with pytest.raises(LedgerError, match="scores was not written"):
        arrived(taps.snapshot(3, replayed=True))


def test_rows_that_have_not_arrived_are_not_given_out() -> None:
    taps = make()
    taps.arm()
    Model(taps)(batch(4, 0.0))
    snapshot = taps.snapshot(4, replayed=False)
    with pytest.raises(LedgerError, match="had not arrived"):
        snapshot.finish()
    snapshot.send(torch.clone)  # under way, and not waited for
    with pytest.raises(LedgerError, match="had not arrived"):
        snapshot.finish()
    snapshot.wait()  # a recording that closes
    assert_rows(snapshot.finish(), batch(4, 0.0))


@pytest.mark.parametrize("x", [torch.ones(2, WIDTH + 1, dtype=torch.bfloat16), torch.ones(2, WIDTH)])
def test_another_tensor_than_announced_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(LedgerError, match=r"hook point early has rows of \d torch\.\w+, expected 6 torch.bfloat16"):
        make().write("early", x)
