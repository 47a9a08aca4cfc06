"""PyTorch attention that does not pay for a cached prefix twice, and in which a request may attend to a kept set.

SGLang's `torch_native` backend pads the queries after a cached prefix to the full length and throws the padding's
output away, so that a hit saves no attention. This one asks for the new queries only, with the mask that the padding
implied. In bfloat16 the bits are the same (`test_switches.py`); in float32 the last ones can differ after
a prefix, because PyTorch's CPU kernel multiplies blocks of queries whose size follows from their number.

A request without a kept set is computed as if none were in its batch, in decode with the bits of the stock code. Those
with one are attended to as one batch there. Memory is not freed: what is not kept is left out of the attention.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from torch import Tensor

from sglang_probe import bf16
from sglang_probe.engine.hooks import guard
from sglang_probe.engine.platform import kept_rows
from sglang_probe.engine.platform.kept_attention import attend_masked, attend_one_query, seen_behind_cache
from sglang_probe.engine.platform.kept_entries import KeptEntries
from sglang_probe.engine.platform.kept_rows import KeptRow
from sglang_probe.engine.platform.kept_slots import KeptSlots
from sglang_probe.errors import LedgerError, UnsupportedError


class ProbeTorchBackend(TorchNativeAttnBackend):  # type: ignore[misc]
    """`torch_native` with unpadded prefill and kept sets. Windows and cross attention are left to the stock code."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._evicted: list[KeptRow] = []
        self._entries: KeptEntries | None = None
        self._layer = 0
        self._dtype = runner.dtype

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Before the layers of a forward: which of its rows attend to a kept set."""
        super().init_forward_metadata(forward_batch)
        self._evicted = self._rows_with_kept_sets(forward_batch) or []

    def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock method."""
        self._layer = layer.layer_id
        return super().forward_extend(q, k, v, layer, *args, **kwargs)

    def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock method."""
        self._layer = layer.layer_id
        return super().forward_decode(q, k, v, layer, *args, **kwargs)

    def _run_sdpa_forward_extend(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        extend_prefix_lens: Tensor,
        extend_seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Attention of the new tokens of each request; shapes as in the stock method."""
        lengths = (seq_lens, extend_prefix_lens, extend_seq_lens)
        if not options["causal"] or _special(encoder_lens, options):
            self._refuse_kept_sets()
            stock: Any = super()._run_sdpa_forward_extend
            entries = self._entries_of_layer(req_to_token, req_pool_indices, seq_lens)
            result: Tensor = stock(query, output, k_cache, v_cache, *entries, *lengths, encoder_lens, **options)
            return result
        evicted = {e.row: e for e in self._evicted}
        scaling = options["scaling"]
        start = 0
        for row, (request, total, new) in enumerate(
            zip(req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), strict=True)
        ):
            slots = req_to_token[request, :total]
            q_NHD = query[start : start + new]
            k_LGD, v_LGD = k_cache.index_select(0, slots), v_cache.index_select(0, slots)
            done = None
            if row in evicted:
                done = self._extend_kept(evicted[row], q_NHD, k_LGD, v_LGD, scaling)
            output[start : start + new] = _extend(q_NHD, k_LGD, v_LGD, scaling) if done is None else done
            start += new
        return output

    def _run_sdpa_forward_decode(
        self,
        query: Tensor,
        output: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        req_to_token: Tensor,
        req_pool_indices: Tensor,
        seq_lens: Tensor,
        encoder_lens: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Attention of one new token of each request; shapes as in the stock method."""
        if _special(encoder_lens, options):
            self._refuse_kept_sets()
            stock: Any = super()._run_sdpa_forward_decode
            entries = self._entries_of_layer(req_to_token, req_pool_indices, seq_lens)
            result: Tensor = stock(query, output, k_cache, v_cache, *entries, seq_lens, encoder_lens, **options)
            return result
        scaling = options["scaling"]
        rows = [e.row for e in self._evicted]
        done = self._decode_kept(query[rows], k_cache, v_cache, scaling) if rows else None
        if done is not None:
            output[rows] = done
        kept = set() if done is None else set(rows)
        for row, (request, total) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
            if row not in kept:
                slots = req_to_token[request, :total]
                k_LGD, v_LGD = k_cache.index_select(0, slots), v_cache.index_select(0, slots)
                output[row : row + 1] = _attend(query[row : row + 1], k_LGD, v_LGD, scaling)
        return output

    def _entries_of_layer(self, req_to_token: Tensor, rows: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Where a layer's entries are: slots by request and position, and each row's request in it.

        Layers with a window may have a pool of their own. The stock code writes into that by its numbers, and reads
        from it by those of the other pool.
        """
        if not getattr(self, "use_sliding_window_kv_pool", False):
            return req_to_token, rows
        pool: Any = self.token_to_kv_pool
        if not pool.layers_mapping[self._layer][1]:
            return req_to_token, rows
        slots = req_to_token[rows, : int(seq_lens.max())].to(torch.int64)
        return pool.translate_loc_from_full_to_swa(slots), torch.arange(len(rows))

    @guard.guarded
    def _rows_with_kept_sets(self, forward_batch: Any) -> list[KeptRow]:
        """The rows of this forward, with the entries that they read if it is a decode step.

        Raises:
            LedgerError: the batch is not the one that was planned.
        """
        rows = list(kept_rows.at_hand)
        if not rows:
            return []
        at = [r.row for r in rows]
        lengths = forward_batch.seq_lens[at].tolist()
        if lengths != [r.end for r in rows]:
            raise LedgerError(f"SGLang computes lengths {lengths} of requests that were planned otherwise")
        if forward_batch.forward_mode.is_decode():
            table = self.req_to_token_pool.req_to_token
            requests = forward_batch.req_pool_indices[at].tolist()
            slots = [table[request, : r.end] for request, r in zip(requests, rows, strict=True)]
            known = None if self._entries is None else self._entries.slots
            if known is None or not known.advance(rows, slots):
                self._entries = KeptEntries(KeptSlots(rows, slots, self._dtype, known), self._dtype)
        return rows

    @guard.guarded
    def _extend_kept(
        self, evicted: KeptRow, q_NHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, scaling: float | None
    ) -> Tensor:
        """Queries before the end of the cache see everything before them; those after it, the kept set."""
        end = evicted.kept.length
        inside = max(0, end - evicted.start)
        seen = seen_behind_cache(evicted.kept, self._layer, evicted.start + inside, evicted.end)
        behind = attend_masked(q_NHD[inside:], k_LGD, v_LGD, seen, scaling)
        if not inside:
            return behind
        return torch.cat([_extend(q_NHD[:inside], k_LGD[:end], v_LGD[:end], scaling), behind])

    @guard.guarded
    def _decode_kept(self, q_BHD: Tensor, k_cache: Tensor, v_cache: Tensor, scaling: float | None) -> Tensor:
        assert self._entries is not None
        return attend_one_query(q_BHD, *self._entries.of_layer(self._layer, k_cache, v_cache), scaling)

    @guard.guarded
    def _refuse_kept_sets(self) -> None:
        if self._evicted:
            raise UnsupportedError("a kept set in a layer with a sliding window or cross attention")


def _special(encoder_lens: Tensor | None, options: dict[str, Any]) -> bool:
    return (
        encoder_lens is not None or bool(options.get("is_cross_attn")) or options.get("sliding_window_size") is not None
    )


def _extend(q_NHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, scaling: float | None) -> Tensor:
    """The last N positions of a request over all L of it, each up to its own."""
    new, total = len(q_NHD), len(k_LGD)
    if total == new:
        return _attend(q_NHD, k_LGD, v_LGD, scaling, is_causal=True)
    mask = torch.arange(total)[None, :] <= torch.arange(total - new, total)[:, None]
    return _attend(q_NHD, k_LGD, v_LGD, scaling, attn_mask=mask)


def _attend(q_NHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, scaling: float | None, **options: Any) -> Tensor:
    out_HND = bf16.attention(
        q_NHD.transpose(0, 1)[None],
        k_LGD.transpose(0, 1)[None].to(q_NHD.dtype),
        v_LGD.transpose(0, 1)[None].to(q_NHD.dtype),
        enable_gqa=q_NHD.shape[1] != k_LGD.shape[1],
        scale=scaling,
        **options,
    )[0]
    return out_HND.transpose(0, 1)
