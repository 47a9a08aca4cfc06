"""Attention telemetry of the decode steps of each forward, from their queries and the paged keys: which steps, and
their measurement on the reference platform. `device_telemetry.py` measures without waiting for the device.

The queries are the arguments of each layer's `RadixAttention`, copied when it is called. The keys lie in the KV pool
when the forward has returned, this step's among them, and nothing is freed before its result is processed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_probe.ask import Ask
from sglang_probe.engine.capture.taps import Tap
from sglang_probe.engine.capture.telemetry import Measured, Steps, Telemetry, logits
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.attention_rows import check_attention
from sglang_probe.errors import UnsupportedError
from sglang_probe.run.telemetry_options import TelemetryConfig, layers_of

if TYPE_CHECKING:
    from sglang_probe.engine.ledger.facts import ForwardPlan

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class AskedTelemetry:
    """Which decode steps each forward measures, of which layers.

    Raises (on construction):
        ConfigError: a layer does not exist. UnsupportedError: its attention is not a softmax over all keys.
    """

    def __init__(self, layers: Sequence[Any], config: TelemetryConfig) -> None:
        self.layers = layers_of(config, len(layers))
        self._config = config
        self._cores = []
        for i in self.layers:
            check_attention(layers[i].self_attn, i)
            core = layers[i].self_attn.attn
            check_softmax(core, i, "telemetry")
            self._cores.append(core)
        self._system: dict[str, Sequence[Sequence[int]]] = {}
        self._steps: Steps | None = None

    def restart(self) -> None:
        """Forget all requests: another recording begins."""
        self._system.clear()
        self._steps = None

    def launch(self, asks: Sequence[Ask], plan: ForwardPlan) -> None:
        """Note which decode steps the coming forward computes and is to measure."""
        self._steps = None
        decoding = np.array(plan.decoding)
        if not decoding.any():
            return
        starts, prompt = np.array(plan.starts), np.array(plan.prompt_lens)
        at = np.flatnonzero(decoding & (starts >= prompt) & ((starts - prompt) % self._config.every == 0))
        if not len(at):
            return
        ranges = [self._system_of(plan.rids[i], asks[i]) for i in at]
        system = np.zeros((len(at), max(1, *map(len, ranges)), 2), dtype=np.int64)
        for row, found in zip(system, ranges, strict=True):
            row[: len(found)] = found or 0
        known = np.array([plan.rids[i] in self._system for i in at])
        self._steps = Steps(at, prompt[at], starts[at] + 1, system, known)

    def end(self, rid: str) -> None:
        """Forget a request."""
        self._system.pop(rid, None)

    def _system_of(self, rid: str, ask: Ask) -> Sequence[Sequence[int]]:
        """Ranges of the system prompt, as the request itself says."""
        if rid not in self._system:
            if ask.system is None:
                return []
            self._system[rid] = ask.system
        return self._system[rid]


class EngineTelemetry(AskedTelemetry):
    """The measurements of one engine, installed on its layers. The numbers are read at once."""

    taps = None  # of graphs

    def __init__(self, layers: Sequence[Any], config: TelemetryConfig) -> None:
        super().__init__(layers, config)
        self._queries = [Tap(f"queries of layer {i}") for i in self.layers]
        for core, tap in zip(self._cores, self._queries, strict=True):
            core.register_forward_pre_hook(self._query_hook(tap))
        self.restart()

    def restart(self) -> None:
        super().restart()
        self._telemetry = Telemetry(self.layers, self._config.options())

    def launch(self, asks: Sequence[Ask], plan: ForwardPlan) -> None:
        super().launch(asks, plan)
        for tap in self._queries:
            tap.written = -1

    def prepare(self, runner: Any, forward_batch: Any, plan: ForwardPlan) -> None:
        """Nothing has to be known before the forward."""

    def measure(self, runner: Any, forward_batch: Any, plan: ForwardPlan, *, replayed: bool) -> None:
        """Measure what `launch` noted, after the forward has run."""
        steps, self._steps = self._steps, None
        if steps is None:
            return
        device = forward_batch.req_pool_indices.device
        rows_B = torch.from_numpy(first_rows(plan)[steps.at]).to(device)
        requests_B = forward_batch.req_pool_indices[torch.from_numpy(steps.at).to(device)]
        slots_BJ = runner.req_to_token_pool.req_to_token[requests_B, : int(steps.keys.max())].long()
        slots_BJ *= torch.from_numpy(np.arange(slots_BJ.shape[1]) < steps.keys[:, None]).to(device)  # rest: any slot
        rids = [plan.rids[i] for i in steps.at]

        def logits_of(i: int) -> torch.Tensor:
            core, tap = self._cores[i], self._queries[i]
            keys = check_keys(runner.token_to_kv_pool.get_key_buffer(core.layer_id))
            if tap.buffer is None or tap.written != plan.tokens:
                raise UnsupportedError(f"{tap.hook_point} were seen for {tap.written} of {plan.tokens} tokens")
            return logits(tap.buffer.index_select(0, rows_B), keys, slots_BJ, core.scaling)

        found = self._telemetry.measure(steps, rids, logits_of, device)
        host = {name: x.cpu().numpy() for name, x in found.items()}
        plan.telemetry = Measured(
            layers=self.layers,
            top_positions=host.pop("top_positions"),
            top_weights=host.pop("top_weights"),
            numbers=host,
            rids=rids,
            attempts=np.array(plan.attempts)[steps.at],
            positions=steps.keys - 1,
            forward_id=plan.forward_id,
        )

    def end(self, rid: str) -> None:
        super().end(rid)
        self._telemetry.memory.end(rid)

    def _query_hook(self, tap: Tap) -> Callable[..., None]:
        @guard.guarded
        def write_query(_module: Any, args: tuple[Any, ...]) -> None:
            if self._steps is not None:
                tap.write(args[0].flatten(1), 1024)

        return write_query


def first_rows(plan: ForwardPlan) -> np.ndarray[Any, Any]:
    """Row of each request's first token among those of the forward."""
    return np.cumsum([0, *(e - s for s, e in zip(plan.starts, plan.ends, strict=True))])


def check_keys(keys: torch.Tensor) -> torch.Tensor:
    """The keys of a layer, `[slots, kv heads, head dim]`, if they are floats in that order.

    Raises:
        UnsupportedError: they are not. With `SGLANG_USE_HND_KVCACHE` SGLang lays them out by pages and heads.
    """
    if keys.dtype not in _FLOATS:
        raise UnsupportedError(f"telemetry of a KV cache in {keys.dtype}")
    if keys.ndim != 3:
        raise UnsupportedError(
            f"telemetry of a KV cache of shape {list(keys.shape)}, which is not by slots",
            fix="leave `SGLANG_USE_HND_KVCACHE` unset",
        )
    return keys


def check_softmax(core: Any, layer: int, of: str) -> None:
    """Refuse attention that is not a softmax over all keys.

    Raises:
        UnsupportedError: names layer and what it has, and `of` what.
    """
    window = core.sliding_window_size
    if core.logit_cap or (window is not None and window > -1):
        what = f"soft-capped logits ({core.logit_cap})" if core.logit_cap else f"a sliding window ({window})"
        raise UnsupportedError(f"{of} of layer {layer}, which has {what}", fix="leave it out")
