"""The check of captured graphs where SGLang captures them: capture and replay are simulated on the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments import accelerator
from sglang_probe.engine.hooks.instruments.graph_check import GraphCheck, capture_one, prefill_prepared
from sglang_probe.engine.hooks.instruments.rows import Rows
from sglang_probe.engine.hooks.session import Session
from tests.engine.capture.graph import WIDTH, Graph, Note, Noting, replay
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


Tap = Callable[[GraphTaps, torch.Tensor], None]


class Segment:
    """A graph between two breaks."""

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self.noting = Noting(self.notes)
        self.noting.__enter__()

    def replay(self) -> None:
        replay(self.notes)


class BreakableBackend:
    """`BreakableCudaGraphBackend`, as far as it is used: SGLang's own breaks and its own order at replay, between
    segments that are simulated."""

    def __init__(self) -> None:
        from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import breakable_cuda_graph as sglang

        self.sglang, self._barrier_fn, self.capturing = sglang, None, False
        self.cuda_graph = sglang.BreakableCUDAGraph(None)

    def capture_one(self, _key: int, forward: Any) -> None:
        forward()
        forward()
        token, self.capturing = self.sglang._current_capture_var.set(self), True
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(self.sglang, "_weak_ref_if_tensor", lambda x: x)  # needs a device on 0.5.17
            self._begin_new_segment()
            forward()
            self._end_current_segment()
        self.sglang._current_capture_var.reset(token)
        self.capturing = False

    def _begin_new_segment(self) -> None:
        self.segment = Segment()

    def _end_current_segment(self) -> None:
        self.segment.noting.__exit__(None, None, None)
        self.cuda_graph._append_segment(self.segment, needs_instantiate=False)

    def replay(self, _key: int, _batch: Any) -> None:
        self.cuda_graph.replay()


class Prefill:
    """`PrefillCudaGraphRunner` and the body of a model: embedding, a product, and attention that Python runs.

    Args:
        tap: in place of the tap of the residual where a graph is captured.
    """

    def __init__(self, engine: Engine, tap: Tap | None = None) -> None:
        from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import eager_on_graph

        self.engine, self.model_runner, self.current = engine, engine.runner, list[Any]()
        self.tap, self.backend = tap, BreakableBackend()
        self.attention = eager_on_graph(True)(self._attention)
        self.breaks = 0

    def capture_prepare(self, num_tokens: int) -> tuple[Any, None]:
        batch = self.engine.batch
        made = SimpleNamespace(input_ids=batch.input_ids[:num_tokens], positions=batch.positions[:num_tokens])
        return made, None

    @contextmanager
    def _prefill_forward_context(self, batch: Any, *, num_tokens: int, raw_num_tokens: int) -> Iterator[None]:
        assert num_tokens == raw_num_tokens == len(batch.input_ids)
        self.current.append(batch)
        yield
        self.current.pop()

    def _attention(self, h: torch.Tensor, output: torch.Tensor) -> None:
        """Not recorded: run at each replay, on the batch that is current then."""
        self.breaks += 1
        output.copy_(h.cumsum(0) + self.current[-1].positions[:, None])

    def forward(self, batch: Any) -> None:
        with self._prefill_forward_context(batch, num_tokens=len(batch.input_ids), raw_num_tokens=len(batch.input_ids)):
            x = self.engine.table.index_select(0, batch.input_ids)
            self.engine.taps.write("hook_embed", x)
            h = x @ self.engine.matrix
            output = torch.empty_like(h)
            self.attention(h, output)
            if self.tap is not None and self.backend.capturing:
                self.tap(self.engine.taps, output)
            else:
                self.engine.taps.write(POINT, output)

    def capture(self, tokens: int) -> BreakableBackend:
        made = self.capture_prepare(tokens)
        prefill_prepared(made, self, tokens)
        self.backend = BreakableBackend()
        capture_one(lambda b, *args: b.capture_one(*args), self.backend, tokens, lambda: self.forward(made[0]))
        return self.backend


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


def test_prefill_graphs_in_segments_are_checked_in_the_context_that_attention_asks(
    engine: Engine, running: Session
) -> None:
    prefill = Prefill(engine)
    backend = prefill.capture(4)
    prefill.capture(3)
    engine.capture(2)
    assert running.fault is None
    assert len(backend.cuda_graph._segments) == 2  # attention lies between them
    assert prefill.breaks == 2 * (3 + 2 + 1)  # warmed up and captured, replayed, and without a graph
    told = running.facts()["graphs_checked"]
    assert (told["prefill_sizes"], told["sizes"]) == ([3, 4], [2])
    assert told["worst"] == {"hook_embed": 0.0, POINT: 0.0}
    assert engine.batch.input_ids.tolist() == [0] * 4
    with pytest.raises(IndexError):  # a replay outside of it asks for a batch that is not there
        backend.replay(4, None)


STALE = torch.randn(4, WIDTH)


@pytest.mark.parametrize(
    ("tap", "said"),
    [
        (lambda taps, h: None, "row 0 was not written"),
        (lambda taps, h: taps.write(POINT, h.roll(1, 0)), r"row \d is wrong, it differs from the eager forward by"),
        (lambda taps, h: taps.write(POINT, STALE), r"row \d is wrong, it is that of the replay before"),
    ],
    ids=["left out", "shifted", "baked in"],
)
def test_a_tap_that_is_wrong_in_the_segments_alone_is_named(
    tap: Tap, said: str, engine: Engine, running: Session
) -> None:
    Prefill(engine, tap).capture(4)
    assert re.search(f"{POINT} of the graph for 4 tokens: {said}", str(running.fault))


def test_a_prefill_graph_of_a_draft_model_is_passed_over(engine: Engine, running: Session) -> None:
    prefill = Prefill(engine)
    prefill.model_runner = SimpleNamespace()
    prefill.capture(4)
    assert running.fault is None
    assert running.facts().get("graphs_checked") is None


def test_a_decode_graph_in_segments_is_not_called_checked(engine: Engine, running: Session) -> None:
    made = BreakableBackend()
    capture_one(lambda b, *args: b.capture_one(*args), made, 2, lambda: engine.forward(2))
    assert running.fault is None
    assert running.facts().get("graphs_checked") is None


def test_it_is_wanted_where_rows_leave_through_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = EngineProbeConfig(run=tmp_path, hook_points=["hook_embed"])
    assert not GraphCheck.wanted(rows)
    monkeypatch.setattr(accelerator, "accelerator_present", lambda: True)
    assert GraphCheck.wanted(rows)
    assert not GraphCheck.wanted(EngineProbeConfig(run=tmp_path, telemetry={}))
