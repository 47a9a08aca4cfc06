"""Attention telemetry of decode steps without the host ever waiting for the device.

What the device has to be told of a forward is host integers, uploaded at once before it runs. After it a summary of
each layer's attention (`attention_kernel.py`, on a CPU `attention_reference.py`; `slot_lists.py` for `by: lists`) gives
the numbers of `engine/capture/telemetry.py`, which travel to the host as one tensor. Shapes as there, and R regions of
positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sglang_probe.engine.capture.attention_summary import AttentionSummary
from sglang_probe.engine.capture.graph_taps import GraphTaps, refuse_unwritten
from sglang_probe.engine.capture.slot_lists import RegionDecode, RegionLists
from sglang_probe.engine.capture.telemetry import SYSTEM, Measured, Memory, Steps, jump_scores, relative
from sglang_probe.engine.capture.transfer import Transfer, upload
from sglang_probe.run.telemetry_options import NUMBERS, REGIONS, TelemetryOptions

Array = np.ndarray[Any, Any]
MOST_BYTES = 1 << 30
"""Of the device's memory for what is remembered of earlier steps. Where it does not suffice, `jump` is NaN."""
_PAD = 64
"""Lengths are rounded up to it, so that a kernel is not compiled for each."""


def region_ends(steps: Steps, options: TelemetryOptions) -> tuple[Array, Array]:
    """Borders of the runs of positions that have one region each, exclusive and ascending, int64 `[B, R]`, and which of
    `REGIONS` each of the R runs is.

    R is 5 and two for each range of the system prompt. Positions among the first `sinks` that are generated (after a
    very short prompt) are a run of their own, the last but one: they are sinks to the entropy without sinks.
    """
    prompt, keys = steps.prompt[:, None], steps.keys[:, None]
    sinks = np.minimum(options.sinks, prompt)
    window = np.maximum(prompt - options.window, sinks)
    order = np.argsort(steps.system[..., 0], axis=1, kind="stable")[..., None]
    system = np.take_along_axis(steps.system, order, 1).reshape(len(steps), -1)
    generated_sinks = np.minimum(np.maximum(options.sinks, prompt), keys)
    ends = np.concatenate([sinks, np.clip(system, sinks, window), window, prompt, generated_sinks, keys], 1)
    kinds = ["sinks", *["prompt", "system"] * steps.system.shape[1], "prompt", "window", "generated", "generated"]
    return np.maximum.accumulate(ends, 1), np.array([REGIONS.index(k) for k in kinds])


def upload_all(arrays: Mapping[str, Array], device: torch.device) -> dict[str, Tensor]:
    """Integers as int64 on the device, in one copy; each array begins at a multiple of 16 bytes."""
    flat = {name: np.append(x.ravel(), [0] * (x.size % 2)).astype(np.int64) for name, x in arrays.items()}
    packed = upload(np.concatenate(list(flat.values())), device)
    found, begin = {}, 0
    for name, x in arrays.items():
        found[name] = packed[begin : begin + x.size].view(x.shape)
        begin += len(flat[name])
    return found


@dataclass(frozen=True)
class Prepared:
    """What one forward is to measure, here and on the device."""

    steps: Steps
    rids: list[str]
    places: Array
    step: Array
    longest: int
    """Keys of the longest prompt, rounded up."""
    on_device: dict[str, Tensor]
    slots_BJ: Tensor
    ends: Array
    """`region_ends`."""


class DeviceTelemetry:
    """Measures decode steps of the layers of one engine.

    Args:
        layers: their numbers, in the order in which `measure` takes them. heads: query heads of each.
        summarise: `attention_summary` of `attention_kernel` or of `attention_reference`; or decodes of lists.
    """

    def __init__(
        self,
        layers: list[int],
        options: TelemetryOptions,
        *,
        heads: int,
        device: torch.device,
        summarise: Callable[..., AttentionSummary] | RegionDecode,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.layers, self.options, self._device = layers, options, device
        self.memory = Memory(len(layers), max(1, options.memory), most_bytes)
        self._summarise = summarise
        self._heads = heads
        self._heads_N = upload(np.arange(heads), device)

    def prepare(self, steps: Steps, first_rows: Array, rids: list[str], requests_B: Tensor, table: Tensor) -> Prepared:
        """Before the forward is enqueued: upload what it measures, and copy the slots of its requests' keys.

        Args:
            first_rows: row of each step among the tokens of the forward, `[B]`. rids: the request of each.
            requests_B: the batch's rows of `table`, on the device. table: `req_to_token`, `[requests, positions]`.
        """
        ends, regions = region_ends(steps, self.options)
        places = self.memory.places(rids)
        step = (steps.keys - 1 - steps.prompt) // self.options.every
        on_device = upload_all(
            {
                "rows": first_rows,
                "at": steps.at,
                "keys": steps.keys,
                "prompt": steps.prompt,
                "ends": ends,
                "regions": regions,
                "system_unknown": ~steps.system_known,
                "places": places,
                "fresh": np.array(self.memory.fresh, dtype=np.int64),
                "cells": self.memory.cells(places, step),
                "incomplete": ~self.memory.complete(places, step),
            },
            self._device,
        )
        slots_BJ = table[:, : _rounded(steps.keys)].index_select(0, requests_B.index_select(0, on_device["at"]))
        return Prepared(steps, rids, places, step, _rounded(steps.prompt), on_device, slots_BJ, ends)

    def measure(self, at: Prepared, q_LBHD: Sequence[Tensor], pools: Sequence[Tensor], scaling: list[float]) -> Tensor:
        """After the forward: the numbers in the order of `NUMBERS`, then the top positions (int32 by their bits) and
        the top weights, float32 `[L, B, H, len(NUMBERS) + 2k]`.

        Args:
            q_LBHD: rotated queries of the steps, of each layer. pools: the layers' `[slots, G, D]` keys.
        """
        x, memory, summarise = at.on_device, self.memory, self._summarise
        lists = RegionLists(at.slots_BJ, at.ends) if isinstance(summarise, RegionDecode) else None
        remembers = lists is None and memory.has_room(self._heads, at.longest)
        found = []
        for i, (q_BHD, pool_SGD) in enumerate(zip(q_LBHD, pools, strict=True)):
            if isinstance(summarise, RegionDecode):
                assert lists is not None
                summary = lists.summary(summarise.decodes, q_BHD, pool_SGD, scaling=scaling[i], base=summarise.base)
            else:
                summary = summarise(
                    q_BHD,
                    pool_SGD,
                    at.slots_BJ,
                    x["keys"],
                    x["ends"],
                    self._heads_N,
                    scaling=scaling[i],
                    top_k=self.options.top_k,
                    first_B=x["prompt"] if remembers else None,
                    longest=at.longest if remembers else 0,
                )
            if summary.first_logits is None:
                jump_BH = torch.full_like(summary.lse[..., 0], torch.nan)
            else:
                p_BHP = torch.softmax(summary.first_logits, -1)
                past_BMHP = memory.past(i, at.places, x["places"], x["fresh"], self._heads, at.longest)
                jump_BH = jump_scores(p_BHP, past_BMHP.mean(1))
                jump_BH = jump_BH.masked_fill(x["incomplete"][:, None] != 0, torch.nan)
                memory.remember(i, x["cells"], p_BHP)
            found.append(_numbers(summary, jump_BH, x, self.options))
        if remembers:
            memory.remembered(at.places, at.step)
        return torch.stack(found)


def _rounded(lengths: Array) -> int:
    return -(-int(lengths.max()) // _PAD) * _PAD


def _numbers(summary: AttentionSummary, jump_BH: Tensor, x: dict[str, Tensor], options: TelemetryOptions) -> Tensor:
    entropy = summary.entropy()
    keys_B1 = x["keys"][:, None].float()
    masses_BHR = summary.mass()
    sums = masses_BHR.new_zeros((*masses_BHR.shape[:2], len(REGIONS))).index_add_(2, x["regions"], masses_BHR)
    sums[..., SYSTEM].masked_fill_(x["system_unknown"][:, None] != 0, torch.nan)
    sinks = (0, masses_BHR.shape[2] - 2)
    named = {
        "entropy": relative(entropy, keys_B1),
        "entropy_without_sinks": relative(summary.entropy(without=sinks), keys_B1 - options.sinks),
        "support": entropy.exp(),
        **{f"mass_{r}": sums[..., i] for i, r in enumerate(REGIONS)},
        "jump": jump_BH,
    }
    positions = summary.top_positions.masked_fill(summary.top_weights == 0, -1)
    numbers = torch.stack([named[name] for name in NUMBERS], -1)
    return torch.cat([numbers, positions.view(torch.float32), summary.top_weights], -1)


class TelemetryOnTheWay(Transfer):
    """What `DeviceTelemetry.measure` gave for one forward, and whether its queries were written.

    Args:
        written: `GraphTaps.marks` of a replayed forward, none of an eager one. taps: their names.
        measured: what the host knows already.
    """

    def __init__(
        self, numbers: Tensor, written: Tensor | None, taps: list[str], top_k: int, measured: Callable[..., Measured]
    ) -> None:
        parts = [numbers.view(torch.uint8).flatten(), *([] if written is None else [written])]
        super().__init__(torch.cat(parts))
        self._shape, self._taps, self._top_k, self._measured = numbers.shape, taps, top_k, measured

    def finish(self) -> Measured:
        """The numbers.

        Raises:
            LedgerError: they have not arrived, or the graph that was replayed did not write the queries.
        """
        received = self.host.numpy()
        size = 4 * int(np.prod(self._shape))
        marks = received[size:]
        if len(marks):
            refuse_unwritten(self._taps, GraphTaps.unwritten(marks))
        numbers = received[:size].view(np.float32).reshape(self._shape)
        n, k = len(NUMBERS), self._top_k
        return self._measured(
            numbers={name: np.ascontiguousarray(numbers[..., i]) for i, name in enumerate(NUMBERS)},
            top_positions=np.ascontiguousarray(numbers[..., n : n + k]).view(np.int32),
            top_weights=np.ascontiguousarray(numbers[..., n + k :]),
        )
