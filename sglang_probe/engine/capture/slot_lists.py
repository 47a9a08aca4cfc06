"""Attention over explicit lists of KV entries, as a paged decode with pages of one entry computes it.

Two abilities need no kernel of ours where such a decode is there (FlashInfer's `BatchDecodeWithPagedKVCacheWrapper`,
which SGLang's backend of that name plans with pages of one slot, `layers/attention/flashinfer_backend.py`):

* **Telemetry by region.** Each region of a request's positions is a list of its own, asked with the same query. The
  decode returns the log-sum-exp of the region. Given the *keys* as values it returns the mean key under the region's
  weights as well, and that times the query is the mean logit: masses and entropies follow exactly
  (`attention_summary.py`). The top positions and the logits of single keys do not, so that there is no `jump`.
* **Eviction per kv head.** Entry `slot * G + g` of a pool `[S, G, D]` that is seen as `[S * G, 1, 1, D]` is what kv
  head g reads at a slot (as in `platform/kept_slots.py`). Each request and kv head is a list, asked with the queries of
  its group.

Lists are laid out from what the host knows, so that neither the host waits for the device nor `plan` has to read its
`indptr` back: that one stays on the host. Not used by the engine, and not run on a GPU: `tests/engine/capture/
test_slot_lists.py` runs it on a model of the decode and compares it with the reference platform's attention.

Shapes: B requests, R regions, H query heads, G kv heads, D head dim, J positions or columns, N lists, S slots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sglang_probe.engine.capture.attention_summary import AttentionSummary
from sglang_probe.engine.capture.transfer import upload
from sglang_probe.errors import UnsupportedError

Ints = np.ndarray[Any, Any]


class PagedDecode(Protocol):
    """What is used of FlashInfer's wrapper, layout `NHD`."""

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        **options: Any,
    ) -> Any:
        """Which pages each query reads: `indices[indptr[i] : indptr[i + 1]]`. Options: `sm_scale`, `q_data_type`,
        `kv_data_type`."""

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, return_lse: bool = False) -> Any:
        """Attention `[N, heads, D]` of queries `[N, heads, D]` over pools `[pages, page_size, kv heads, D]`, in the
        dtype of the queries; and the log-sum-exp `[N, heads]`, float32, to base 2 or e."""


@dataclass(frozen=True)
class Lists:
    """Entries that each of N queries reads; none is empty."""

    indptr: Tensor
    """int32 `[N + 1]`, on the host."""
    entries: Tensor
    """int32, on the device of the pool."""

    def plan(self, decode: PagedDecode, q_NHD: Tensor, pool: Tensor, scaling: float) -> None:
        """Tell a decode of these lists. `pool` is `[entries, 1, kv heads, D]`."""
        ones = torch.ones(len(self.indptr) - 1, dtype=torch.int32, device=self.entries.device)
        decode.plan(
            self.indptr,
            self.entries,
            ones,
            q_NHD.shape[1],
            pool.shape[2],
            pool.shape[3],
            1,
            sm_scale=scaling,
            q_data_type=q_NHD.dtype,
            kv_data_type=pool.dtype,
        )


def lists_of(table: Tensor, starts_N: Ints, ends_N: Ints) -> Lists:
    """The lists `table.flatten()[start:end]`, all of them with one gather.

    Raises:
        ValueError: one is empty.
    """
    lengths = ends_N - starts_N
    if (lengths <= 0).any():
        raise ValueError("a list of entries is empty")
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    at = np.arange(indptr[-1]) + np.repeat(starts_N - indptr[:-1], lengths)
    entries = table.reshape(-1).index_select(0, upload(at.astype(np.int64), table.device))
    return Lists(torch.from_numpy(indptr.astype(np.int32)), entries.to(torch.int32))


def log_base(decode: PagedDecode, pool_SGD: Tensor, heads: int, dtype: torch.dtype) -> float:
    """The base of a decode's log-sum-exp, measured: kernels differ in it. Reads the device.

    Args:
        pool_SGD: of keys, four slots or more, all finite. heads: query heads. dtype: of the queries.

    Raises:
        UnsupportedError: it is neither 2 nor e.
    """
    q_NHD = torch.zeros(1, heads, pool_SGD.shape[-1], dtype=dtype, device=pool_SGD.device)
    pages = pool_SGD[:, None]
    four = lists_of(torch.arange(4, device=pool_SGD.device), np.array([0]), np.array([4]))
    four.plan(decode, q_NHD, pages, 1.0)
    found = float(decode.run(q_NHD, (pages, pages), return_lse=True)[1].mean())  # four logits of 0
    for base in (2.0, math.e):
        if math.isclose(found, math.log(4, base), rel_tol=1e-3):
            return base
    raise UnsupportedError(f"the log-sum-exp of four equal logits is {found:.4f}: neither to base 2 nor to base e")


def summary_by_lists(
    decode: PagedDecode,
    q_BHD: Tensor,
    key_pool_SGD: Tensor,
    slots_BJ: Tensor,
    region_ends_BR: Ints,
    *,
    scaling: float,
    base: float,
    top_k: int = 0,
) -> AttentionSummary:
    """What `attention_reference.attention_summary` gives, apart from top positions (-1) and the first keys' logits.

    The mean logit has the rounding of the decode's output: with queries in bf16 that is a relative error of up to 2**-9
    of the sum of the products, not of the mean.

    Args:
        slots_BJ: rows of `req_to_token`, on the device. region_ends_BR: as of the reference, on the host.
        base: of the decode's log-sum-exp (`log_base`).
    """
    batch, heads, _ = q_BHD.shape
    regions, width = region_ends_BR.shape[1], slots_BJ.shape[1]
    starts_BR = np.pad(region_ends_BR[:, :-1], ((0, 0), (1, 0)))
    full = np.flatnonzero((region_ends_BR > starts_BR).ravel())  # others have no list
    request_N = full // regions
    begin_N, end_N = (x.ravel()[full] + request_N * width for x in (starts_BR, region_ends_BR))
    lists = lists_of(slots_BJ, begin_N, end_N)
    q_NHD = q_BHD.index_select(0, upload(request_N.astype(np.int64), q_BHD.device))
    pages = key_pool_SGD[:, None]
    lists.plan(decode, q_NHD, pages, scaling)
    mean_key_NHD, lse_NH = decode.run(q_NHD, (pages, pages), return_lse=True)
    mean_NH = (mean_key_NHD.float() * q_NHD.float()).sum(-1) * scaling

    at = upload(full.astype(np.int64), q_BHD.device)

    def spread(x_NH: Tensor, empty: float) -> Tensor:
        whole = x_NH.new_full((batch * regions, heads), empty).index_copy_(0, at, x_NH)
        return whole.view(batch, regions, heads).transpose(1, 2)

    return AttentionSummary(
        spread(lse_NH.float() * math.log(base), -math.inf),
        spread(mean_NH, 0.0),
        torch.full((batch, heads, top_k), -1, dtype=torch.int32, device=q_BHD.device),
        torch.zeros((batch, heads, top_k), device=q_BHD.device),
    )


def kept_lists(entry_BGJ: Tensor, kept_BG: Ints, width: int, after_B: Ints) -> Lists:
    """What each request and kv head reads: its kept positions, and those after the cache.

    Args:
        entry_BGJ: entries of one layer (`KeptSlots.entry`): kept ones first, padded to `width`, then those after.
        kept_BG: how many are kept. after_B: how many positions there are after the cache, the newest included.
    """
    batch, heads, columns = entry_BGJ.shape
    row = np.arange(batch * heads) * columns
    kept, after = kept_BG.ravel(), np.repeat(after_B, heads)
    # Two runs of columns a list: laid out as two lists each, and joined.
    starts = np.stack([row, row + width], 1).ravel()
    ends = np.stack([row + kept, row + width + after], 1).ravel()
    there = ends > starts
    pieces = lists_of(entry_BGJ, starts[there], ends[there])
    indptr = np.concatenate([[0], np.cumsum(kept + after)])
    return Lists(torch.from_numpy(indptr.astype(np.int32)), pieces.entries)


def attend_by_lists(
    decode: PagedDecode, q_BHD: Tensor, k_SGD: Tensor, v_SGD: Tensor, lists: Lists, scaling: float
) -> Tensor:
    """One query of each request over the entries of `kept_lists`, `[B, H, D]`: `kept_attention.attend_one_query`."""
    batch, heads, dim = q_BHD.shape
    kv_heads = k_SGD.shape[1]
    q_NHD = q_BHD.reshape(batch * kv_heads, heads // kv_heads, dim)
    k_pages, v_pages = (pool.reshape(-1, 1, 1, dim) for pool in (k_SGD, v_SGD))
    lists.plan(decode, q_NHD, k_pages, scaling)
    out: Tensor = decode.run(q_NHD, (k_pages, v_pages))
    return out.reshape(batch, heads, dim)
