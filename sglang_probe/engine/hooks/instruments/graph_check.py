"""Every captured decode graph is checked when it has been captured, before the engine serves (level P1 of the proof).

SGLang: `model_executor/runner_backend/full_cuda_graph_backend.py` (`capture_one` is given the forward as a function,
runs it twice to warm up, and captures it; `replay` issues the graph);
`model_executor/runner/decode_cuda_graph_runner.py` (the `ForwardBatch` that `capture_tail_hooks` are given consists of
views of the static buffers, which the graph reads).
During a capture `seq_lens` is 1 and every slot is the reserved slot 0, whose writes SGLang's kernels skip: the KV pool,
its allocator and the radix tree are left alone.

Prefill graphs are captured in segments, without tail hooks, and are not checked here.

Not run on a GPU: `tests/engine/hooks/test_graph_check.py` simulates capture and replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable
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

_BACKEND = "sglang.srt.model_executor.runner_backend.full_cuda_graph_backend.FullCudaGraphBackend"


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
        return [(f"{_BACKEND}.capture_one", capture_one, "AROUND")]

    def __init__(self, config: EngineProbeConfig) -> None:
        super().__init__(config)
        self.figures: list[GraphFigures] = []
        self.seconds = 0.0
        self.captured: tuple[Any, int] | None = None
        """The static batch and the tokens of the graph that was captured last, by its tail hook."""
        self._runner: Any = None

    def attach(self, runner: Any) -> None:
        self._runner = runner
        runner.capture_tail_hooks.append(_note)

    def check(self, replay: Callable[[Any], Any], forward: Callable[[], Any]) -> None:
        """Check the rows of the graph that was captured last; nothing of one that has no tail hooks.

        Args:
            replay: issues the graph, given its static batch. forward: what was captured.

        Raises:
            LedgerError: names hook point, graph and row.
        """
        captured, self.captured = self.captured, None
        rows = guard.active().of(Rows)
        if captured is None or rows is None or not isinstance(rows.taps, GraphTaps):
            return
        batch, tokens = captured
        runner, began = self._runner, time.perf_counter()
        whole = guard.active().tp_size == 1  # else each rank holds a part of the vocabulary
        places = torch.arange(tokens, device=batch.positions.device) % runner.model_config.context_len

        def run(ids: torch.Tensor, how: Callable[[], Any]) -> None:
            batch.input_ids[:tokens].copy_(ids)
            batch.positions[:tokens].copy_(places)
            how()

        try:
            found = check_graph(
                rows.taps,
                tokens,
                replay=lambda ids: run(ids, lambda: replay(batch)),
                eager=lambda ids: run(ids, forward),
                vocabulary=int(runner.model_config.vocab_size),
                embedding_VD=runner.model.model.embed_tokens.weight if whole else None,
            )
        finally:
            batch.input_ids[:tokens].zero_()
            batch.positions[:tokens].zero_()
        self.figures.append(found)
        self.seconds += time.perf_counter() - began

    def facts(self) -> dict[str, Any]:
        return {"graphs_checked": self.told()} if self.figures else {}

    def told(self) -> dict[str, Any]:
        """What was found, for manifests: sizes, and of each hook point the worst of all graphs."""
        points = self.figures[0].worst if self.figures else {}
        return {
            "sizes": sorted(f.tokens for f in self.figures),
            "worst": {h: max(f.worst[h] for f in self.figures) for h in points},
            "equal": {h: min(f.equal[h] for f in self.figures) for h in points},
            "seconds": round(self.seconds, 2),
        }


def capture_one(
    original: Callable[..., Any], backend: Any, shape_key: Any, forward: Callable[[], Any], *args: Any, **kwargs: Any
) -> Any:
    """AROUND `FullCudaGraphBackend.capture_one`: check the graph that it captured."""
    check = None if guard.session is None else guard.session.of(GraphCheck)
    if check is not None:
        check.captured = None
    result = original(backend, shape_key, forward, *args, **kwargs)
    if check is not None and guard.active().fault is None:
        try:
            check.check(lambda batch: backend.replay(shape_key, batch), forward)
        except Exception as e:
            guard.active().fail("the check of a captured graph", e)
    return result


def _note(_graphs: Any, _out: Any, forward_batch: Any, num_tokens: int) -> None:
    """In `ModelRunner.capture_tail_hooks`."""
    if (check := guard.active().of(GraphCheck)) is not None:
        check.captured = (forward_batch, num_tokens)
