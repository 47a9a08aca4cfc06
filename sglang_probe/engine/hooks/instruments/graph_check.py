"""Every captured graph is checked when it has been captured, before the engine serves (level P1 of the proof).

SGLang: `model_executor/runner_backend/{full,breakable}_cuda_graph_backend.py` (`capture_one` is given the forward as a
function, runs it twice to warm up, and captures it; `replay` issues the graph).

* Decode, one graph a batch size: `model_executor/runner/decode_cuda_graph_runner.py`. The `ForwardBatch` that
  `capture_tail_hooks` are given consists of views of the static buffers, which the graph reads. `seq_lens` is 1.
* Prefill, one graph a number of tokens, by default in segments with attention run by Python between them:
  `model_executor/runner/prefill_cuda_graph_runner.py`. There are no tail hooks; the batch is what `capture_prepare` has
  made. The segments read its static inputs, and attention asks the current forward context for the batch, so that a
  replay runs inside `_prefill_forward_context`, as SGLang's own does.

During a capture every slot is the reserved slot 0: the KV pool, its allocator and the radix tree are left alone.

Decode graphs in segments are not checked, and a proof of an engine with them fails for that.

Not run on a GPU: `tests/engine/hooks/test_graph_check.py` simulates capture and replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sglang_probe.engine.capture.graph_check import GraphFigures, check_graph
from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.accelerator import Accelerator
from sglang_probe.engine.hooks.instruments.base import Instrument
from sglang_probe.engine.hooks.instruments.rows import Rows
from sglang_probe.engine.releases.base import Hook, Release

if TYPE_CHECKING:
    from sglang_probe.engine.hooks.config import EngineProbeConfig

_BACKENDS = "sglang.srt.model_executor.runner_backend"
_PREFILL = "sglang.srt.model_executor.runner.prefill_cuda_graph_runner.PrefillCudaGraphRunner"


@dataclass
class Captured:
    """What was captured last, or is about to be."""

    batch: Any
    """SGLang's `ForwardBatch` of static buffers."""
    tokens: int
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What a replay runs in."""


class GraphCheck(Instrument):
    """See the module."""

    name = "graph check"
    features = ("accelerator rows",)
    in_model = True

    @classmethod
    def wanted(cls, config: EngineProbeConfig) -> bool:
        return bool(config.hook_points) and Accelerator.wanted(config)

    @classmethod
    def hooks(cls, release: Release) -> list[Hook]:
        return [
            (f"{_BACKENDS}.full_cuda_graph_backend.FullCudaGraphBackend.capture_one", capture_one, "AROUND"),
            (f"{_BACKENDS}.breakable_cuda_graph_backend.BreakableCudaGraphBackend.capture_one", capture_one, "AROUND"),
            (f"{_PREFILL}.capture_prepare", prefill_prepared, "AFTER"),
        ]

    def __init__(self, config: EngineProbeConfig) -> None:
        super().__init__(config)
        self.decode: list[GraphFigures] = []
        self.prefill: list[GraphFigures] = []
        self.seconds = 0.0
        self.captured: Captured | None = None
        """The decode graph that was captured last, by its tail hook."""
        self.prepared: Captured | None = None
        """The prefill graph that is to be captured next."""
        self.runner: Any = None

    def attach(self, runner: Any) -> None:
        self.runner = runner
        runner.capture_tail_hooks.append(_note)

    def check(self, replay: Callable[[Any], Any], forward: Callable[[], Any], *, segments: bool) -> None:
        """Check the rows of the graph that was captured last.

        Args:
            replay: issues the graph, given its static batch. forward: what was captured.
            segments: whether it was captured in segments.

        Raises:
            LedgerError: names hook point, graph and row.
        """
        captured, prepared = self.captured, self.prepared
        self.captured = self.prepared = None
        rows = guard.active().of(Rows)
        if rows is None or not isinstance(rows.taps, GraphTaps):
            return
        if captured is not None:
            if not segments:  # what a decode replay of segments has to run in was not looked into
                self.decode.append(self._check(rows.taps, captured, replay, forward))
        elif prepared is not None:
            self.prefill.append(self._check(rows.taps, prepared, replay, forward))

    def _check(
        self, taps: GraphTaps, captured: Captured, replay: Callable[[Any], Any], forward: Callable[[], Any]
    ) -> GraphFigures:
        batch, tokens = captured.batch, captured.tokens
        runner, began = self.runner, time.perf_counter()
        whole = guard.active().tp_size == 1  # else each rank holds a part of the vocabulary
        places = torch.arange(tokens, device=batch.positions.device) % runner.model_config.context_len

        def run(ids: torch.Tensor, how: Callable[[], Any]) -> None:
            batch.input_ids[:tokens].copy_(ids)
            batch.positions[:tokens].copy_(places)
            how()

        def replayed() -> None:
            with torch.no_grad(), captured.context():
                replay(batch)

        try:
            return check_graph(
                taps,
                tokens,
                replay=lambda ids: run(ids, replayed),
                eager=lambda ids: run(ids, forward),
                vocabulary=int(runner.model_config.vocab_size),
                embedding_VD=runner.model.model.embed_tokens.weight if whole else None,
            )
        finally:
            batch.input_ids[:tokens].zero_()
            batch.positions[:tokens].zero_()
            self.seconds += time.perf_counter() - began

    def facts(self) -> dict[str, Any]:
        return {"graphs_checked": self.told()} if self.decode or self.prefill else {}

    def told(self) -> dict[str, Any]:
        """What was found, for manifests: sizes, and of each hook point the worst of all graphs."""
        figures = [*self.decode, *self.prefill]
        points = figures[0].worst if figures else {}
        return {
            "sizes": sorted({f.tokens for f in self.decode}),
            "prefill_sizes": sorted({f.tokens for f in self.prefill}),
            "worst": {h: max(f.worst[h] for f in figures) for h in points},
            "equal": {h: min(f.equal[h] for f in figures) for h in points},
            "seconds": round(self.seconds, 2),
        }


def capture_one(
    original: Callable[..., Any], backend: Any, shape_key: Any, forward: Callable[[], Any], *args: Any, **kwargs: Any
) -> Any:
    """AROUND `capture_one` of a graph backend: check the graph that it captured."""
    check = None if guard.session is None else guard.session.of(GraphCheck)
    if check is not None:
        check.captured = None
    result = original(backend, shape_key, forward, *args, **kwargs)
    if check is not None and guard.active().fault is None:
        try:
            segments = type(backend).__name__.startswith("Breakable")
            check.check(lambda batch: backend.replay(shape_key, batch), forward, segments=segments)
        except Exception as e:
            guard.active().fail("the check of a captured graph", e)
    return result


def _note(_graphs: Any, _out: Any, forward_batch: Any, num_tokens: int) -> None:
    """In `ModelRunner.capture_tail_hooks`."""
    if (check := guard.active().of(GraphCheck)) is not None:
        check.captured = Captured(forward_batch, num_tokens)


def prefill_prepared(result: Any, graphs: Any, num_tokens: int, *_args: Any, **_kwargs: Any) -> None:
    """AFTER `PrefillCudaGraphRunner.capture_prepare`: this batch is run to warm up, and then captured."""
    check = None if guard.session is None else guard.session.of(GraphCheck)
    if check is None or graphs.model_runner is not check.runner:  # a draft model has taps of nobody
        return
    batch, _backend = result

    def context() -> AbstractContextManager[Any]:
        found: AbstractContextManager[Any] = graphs._prefill_forward_context(
            batch, num_tokens=num_tokens, raw_num_tokens=num_tokens
        )
        return found

    check.prepared = Captured(batch, num_tokens, context)
