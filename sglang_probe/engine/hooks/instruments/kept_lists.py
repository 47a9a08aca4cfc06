"""Eviction on an accelerator, whatever its attention backend: queries past the end of their cache are answered again.

A forward hook on each layer's `RadixAttention`: by then the backend has stored keys and values and attended to all of
them, and the rows of such queries are replaced. A decode step is answered by a paged decode over the lists of its kv
heads (`capture/slot_lists.py`); several queries of one request in a forward, under a mask, as the reference platform
does it. The slots are copied in front of the forward (`device_telemetry.py` says why), and the host reads nothing.

Hooks do not run in a replayed graph: a recording with kept sets needs an engine without graphs. Not run on a GPU.
Shapes: B decode steps, H query heads, G kv heads, D head dim, Y layers, K kept positions of the head with most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sglang_probe.engine.capture.paged_decode import decodes_on
from sglang_probe.engine.capture.slot_lists import attend_by_lists, kept_lists, try_kept
from sglang_probe.engine.capture.transfer import upload
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.hooks.instruments.attention_rows import check_attention
from sglang_probe.engine.hooks.instruments.base import Forward
from sglang_probe.engine.hooks.instruments.host_telemetry import check_keys, check_softmax, first_rows
from sglang_probe.engine.platform.kept_attention import attend_masked, seen_behind_cache
from sglang_probe.engine.platform.kept_rows import KeptRow
from sglang_probe.errors import LedgerError

if TYPE_CHECKING:
    from sglang_probe.kept_set import Kept

Ints = np.ndarray[Any, Any]


@dataclass(frozen=True)
class _Steps:
    """The decode steps of a forward."""

    rows_B: Tensor
    """Their rows among the tokens."""
    slots_BW: Tensor
    after_BA: Tensor
    """Positions after the cache; repeated where a request has fewer."""
    after: Ints
    """How many each has, `[B]`."""


@dataclass(frozen=True)
class _Several:
    """Queries of one request at positions `[start, end)`, all past the cache."""

    row: int
    kept: Kept
    start: int
    end: int
    slots_L: Tensor


class KeptByLists:
    """The hooks on the layers of one engine, and the forward at hand.

    Raises (on construction):
        UnsupportedError: a layer's attention is not a softmax over all keys, or the decode is not there or not right.
    """

    def __init__(self, runner: Any) -> None:
        layers = runner.model.model.layers
        cores = [layer.self_attn.attn for layer in layers]
        for i, layer in enumerate(layers):
            check_attention(layer.self_attn, i)
            check_softmax(cores[i], i, "a kept set")
        heads, self._kv_heads = cores[0].tp_q_head_num, cores[0].tp_k_head_num
        self._device = torch.device(runner.device)
        self._decodes = decodes_on(self._device, runner.dtype, heads // self._kv_heads)
        shape = {"heads": heads, "kv_heads": self._kv_heads, "head_dim": cores[0].head_dim}
        try_kept(self._decodes, **shape, dtype=runner.dtype, device=self._device)
        self._pool: Any = None
        self._steps: _Steps | None = None
        self._several: list[_Several] = []
        self._key: list[tuple[str, int, int, int]] = []
        """Whose positions `_kept_YBGK` are; they stay until a request comes or goes, or its kept set changes."""
        for i, core in enumerate(cores):
            core.register_forward_hook(self._hook(i))

    def before(self, forward: Forward, rows: Sequence[KeptRow]) -> None:
        """In front of a forward: what it replaces, with the slots that it reads."""
        self.drop()
        if not rows or forward.plan is None:
            return
        self._pool = forward.runner.token_to_kv_pool
        table, requests = forward.runner.req_to_token_pool.req_to_token, forward.batch.req_pool_indices
        first = first_rows(forward.plan)
        steps = [r for r in rows if r.end == r.start + 1]
        if steps:
            ends, lengths = (np.array(x) for x in ([r.end for r in steps], [r.kept.length for r in steps]))
            after = ends - lengths
            at, in_batch = upload(np.array([[first[r.row] for r in steps], [r.row for r in steps]]), self._device)
            slots_BW = table[:, : int(ends.max())].index_select(0, requests.index_select(0, in_batch))
            positions = lengths[:, None] + np.minimum(np.arange(after.max()), after[:, None] - 1)
            self._steps = _Steps(at, slots_BW.long(), upload(positions, self._device), after)
            self._keep(steps)
        for r in rows:
            if r.end > r.start + 1:
                begin = max(r.start, r.kept.length)
                slots_L = table[:, : r.end].index_select(0, requests[r.row : r.row + 1])[0].long()
                self._several.append(_Several(int(first[r.row]) + begin - r.start, r.kept, begin, r.end, slots_L))

    def after(self, forward: Forward) -> None:
        """The forward has been enqueued.

        Raises:
            LedgerError: it was replayed, so that nothing was replaced.
        """
        replaced = self._steps is not None or bool(self._several)
        self.drop()
        if replaced and forward.replayed:
            raise LedgerError("a forward with kept sets was replayed from a graph, in which nothing attends to them")

    def drop(self) -> None:
        """Forget the forward at hand."""
        self._steps, self._several = None, []

    def _keep(self, steps: list[KeptRow]) -> None:
        """Kept positions `[Y, B, G, K]` of decode steps on the device, padded, and how many there are."""
        at = [min(r.end - 1 - r.kept.length, len(r.kept.keep_SYGN) - 1) for r in steps]
        key = [(r.rid, r.attempt, id(r.kept), s) for r, s in zip(steps, at, strict=True)]
        if key == self._key:
            return
        kept = [r.kept.keep_SYGN[s].numpy() for r, s in zip(steps, at, strict=True)]
        self._counts_YBG = np.stack([k.sum(-1) for k in kept], 1)
        width = int(self._counts_YBG.max())
        order = [np.argsort(~k, axis=-1, kind="stable")[..., :width] for k in kept]
        padded = [np.pad(o, ((0, 0), (0, 0), (0, width - o.shape[-1]))) for o in order]
        self._kept_YBGK = upload(np.stack(padded, 1).astype(np.int32), self._device)
        self._key = key
        self._sets = [r.kept for r in steps]  # so that no other set takes the identity of one of these

    def _hook(self, layer: int) -> Callable[..., Any]:
        @guard.guarded
        def replace(core: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if self._steps is None and not self._several:
                return None
            k_SGD = check_keys(self._pool.get_key_buffer(core.layer_id))
            v_SGD = self._pool.get_value_buffer(core.layer_id)
            q_NHD = args[0].view(len(args[0]), -1, core.head_dim)
            flat = output.view(len(output), -1)
            if self._steps is not None:
                found_BHD = self._decode(layer, q_NHD.index_select(0, self._steps.rows_B), k_SGD, v_SGD, core.scaling)
                flat.index_copy_(0, self._steps.rows_B, found_BHD.flatten(1).to(flat.dtype))
            for s in self._several:
                rows = slice(s.row, s.row + s.end - s.start)
                k_LGD, v_LGD = (pool.index_select(0, s.slots_L) for pool in (k_SGD, v_SGD))
                seen = upload(seen_behind_cache(s.kept, layer, s.start, s.end).numpy(), self._device)
                found_NHD = attend_masked(q_NHD[rows], k_LGD, v_LGD, seen, core.scaling)
                flat[rows] = found_NHD.flatten(1).to(flat.dtype)
            return output

        return replace

    def _decode(self, layer: int, q_BHD: Tensor, k_SGD: Tensor, v_SGD: Tensor, scaling: float) -> Tensor:
        steps, kept_BGK = self._steps, self._kept_YBGK[layer]
        assert steps is not None
        batch, heads, width = kept_BGK.shape
        after_BGA = steps.after_BA[:, None].expand(batch, heads, -1)
        at_BGJ = torch.cat([kept_BGK.long(), after_BGA], -1)
        slots_BGJ = steps.slots_BW.gather(1, at_BGJ.flatten(1)).view_as(at_BGJ)
        entry_BGJ = slots_BGJ * heads + torch.arange(heads, device=self._device)[:, None]
        lists = kept_lists(entry_BGJ, self._counts_YBG[layer], width, steps.after)
        return attend_by_lists(self._decodes, q_BHD, k_SGD, v_SGD, lists, scaling)
