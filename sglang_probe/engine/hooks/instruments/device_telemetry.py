"""Attention telemetry on an accelerator: enqueued after the forward, and never waited for.

The queries lie in taps of their own, which are part of the recorded graphs and are not written as rows. The keys are
read from the KV pool after the forward, on its stream. The slots are not: SGLang lets its scheduler write
`req_to_token` for the next forward as soon as this one has prepared its attention (`Scheduler._apply_war_barrier`),
so they are copied in front of it. Run on a GPU once (docs/evidence/gpu-results.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_probe.engine.capture.attention_summary import AttentionSummary
from sglang_probe.engine.capture.device_telemetry import DeviceTelemetry, Prepared, TelemetryOnTheWay
from sglang_probe.engine.capture.graph_taps import GraphTaps
from sglang_probe.engine.capture.paged_decode import decodes_on
from sglang_probe.engine.capture.slot_lists import RegionDecode
from sglang_probe.engine.capture.telemetry import Measured
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.host_telemetry import AskedTelemetry, check_keys, first_rows
from sglang_probe.run.hook_points import ROTATED_QUERY
from sglang_probe.run.telemetry_options import TelemetryConfig

if TYPE_CHECKING:
    from sglang_probe.engine.ledger.facts import ForwardPlan


class AcceleratorTelemetry(AskedTelemetry):
    """The measurements of one engine, installed on its layers before graphs are captured.

    Args:
        make_taps: makes graph taps of these columns, on the model's device.

    Raises (on construction):
        ConfigError: a layer does not exist. UnsupportedError: its attention is not a softmax over all keys, or what
            `by: lists` needs is not there or not right.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        config: TelemetryConfig,
        make_taps: Callable[[dict[str, tuple[int, torch.dtype]]], GraphTaps],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(layers, config)
        self._names = [f"blocks.{i}.{ROTATED_QUERY}" for i in self.layers]
        widths = (core.tp_q_head_num * core.head_dim for core in self._cores)
        self.taps = make_taps({name: (width, dtype) for name, width in zip(self._names, widths, strict=True)})
        for name, core in zip(self._names, self._cores, strict=True):
            core.register_forward_pre_hook(self._query_hook(name))
        device = self.taps.buffer.device
        self._summarise = _by_lists(self._cores[0], dtype, device) if config.by == "lists" else _by_kernel(device)
        self.restart()

    def restart(self) -> None:
        super().restart()
        self._prepared: Prepared | None = None
        self._telemetry = DeviceTelemetry(
            self.layers,
            self._config.options(),
            heads=self._cores[0].tp_q_head_num,
            device=self.taps.buffer.device,
            summarise=self._summarise,
        )

    def prepare(self, runner: Any, forward_batch: Any, plan: ForwardPlan) -> None:
        """In front of a forward that is measured."""
        self._prepared = None
        if self._steps is None:
            return
        self.taps.arm()
        self._prepared = self._telemetry.prepare(
            self._steps,
            first_rows(plan)[self._steps.at],
            [plan.rids[i] for i in self._steps.at],
            forward_batch.req_pool_indices,
            runner.req_to_token_pool.req_to_token,
        )

    def measure(self, runner: Any, _forward_batch: Any, plan: ForwardPlan, *, replayed: bool) -> None:
        """Behind it, before the next one is enqueued."""
        at, self._prepared, self._steps = self._prepared, None, None
        if at is None:
            return
        rows_BX = self.taps.source(plan.tokens, replayed=replayed).index_select(0, at.on_device["rows"])
        marks = self.taps.marks() if replayed else None
        self.taps.disarm()
        queries, keys = [], []
        for name, core in zip(self._names, self._cores, strict=True):
            queries.append(self.taps.columns[name].of(rows_BX).view(len(rows_BX), -1, core.head_dim))
            keys.append(check_keys(runner.token_to_kv_pool.get_key_buffer(core.layer_id)))
        numbers = self._telemetry.measure(at, queries, keys, [core.scaling for core in self._cores])
        measured = functools.partial(
            Measured,
            layers=self.layers,
            rids=at.rids,
            attempts=np.array(plan.attempts)[at.steps.at],
            positions=at.steps.keys - 1,
            forward_id=plan.forward_id,
        )
        plan.travelling["telemetry"] = TelemetryOnTheWay(numbers, marks, self._names, self._config.top_k, measured)

    def end(self, rid: str) -> None:
        super().end(rid)
        self._telemetry.memory.end(rid)

    def _query_hook(self, name: str) -> Callable[..., None]:
        @guard.tapping
        def write_query(_module: Any, args: tuple[Any, ...]) -> None:
            # A graph has to hold the copy, whatever it will be replayed for.
            if self._prepared is not None or self.taps.recording():
                self.taps.write(name, args[0].flatten(1))

        return write_query


def _by_lists(core: Any, dtype: torch.dtype, device: torch.device) -> RegionDecode:
    heads, kv_heads = core.tp_q_head_num, core.tp_k_head_num
    decodes = decodes_on(device, dtype, heads // kv_heads)
    shape: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": core.head_dim}
    return RegionDecode.tried(decodes, **shape, dtype=dtype, device=device)


def _by_kernel(device: torch.device) -> Callable[..., AttentionSummary]:
    if device.type == "cuda":
        from sglang_probe.engine.capture.attention_kernel import attention_summary
    else:
        from sglang_probe.engine.capture.attention_reference import attention_summary
    return attention_summary
