"""Attention over explicit lists of KV entries, as a paged decode with pages of one entry computes it.

Two abilities need no kernel of ours where such a decode is there (`paged_decode.py`):

* **Telemetry by region.** Each region of a request's positions is a list of its own, asked with the same query. The
  decode returns the log-sum-exp of the region. Given the *keys* as values it returns the mean key under the region's
  weights as well, and that times the query is the mean logit: masses and entropies follow exactly
  (`attention_summary.py`). The top positions and the logits of single keys do not, so that there is no `jump`.
* **Eviction per kv head.** Entry `slot * G + g` of a pool `[S, G, D]` that is seen as `[S * G, 1, 1, D]` is what kv
  head g reads at a slot (as in `platform/kept_slots.py`). Each request and kv head is a list, asked with the queries of
  its group.

Lists are laid out from what the host knows, so that neither the host waits for the device nor `plan` has to read
anything back.

Shapes: B requests, R regions, H query heads, G kv heads, D head dim, J positions or columns, N lists, S slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sglang_probe.engine.capture.attention_reference import attention_summary
from sglang_probe.engine.capture.attention_summary import AttentionSummary
from sglang_probe.engine.capture.paged_decode import Decodes, PagedDecode
from sglang_probe.engine.capture.transfer import upload
from sglang_probe.engine.platform.kept_attention import attend_one_query
from sglang_probe.errors import UnsupportedError

Ints = np.ndarray[Any, Any]
_OFF = 2e-2
"""A decode that is tried may differ so much from PyTorch: the rounding of bf16, in a mean of a few entries."""


@dataclass(frozen=True)
class Lists:
    """Entries that each of N queries reads; none is empty."""

    indptr: Tensor
    """int32 `[N + 1]`, on the host."""
    entries: Tensor
    """int32, on the device of the pool."""

    def planned(self, decodes: Decodes, q_NHD: Tensor, pool: Tensor, scaling: float) -> PagedDecode:
        """A decode that knows these lists. `pool` is `[entries, 1, kv heads, D]`."""
        return decodes.plan(
            self.indptr,
            self.entries,
            _on_host(np.ones(len(self.indptr) - 1), self.entries.device),
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
    total = int(indptr[-1])
    shift_N, lengths_N = upload(np.stack([starts_N - indptr[:-1], lengths]), table.device)
    at = torch.repeat_interleave(shift_N, lengths_N, output_size=total) + torch.arange(total, device=table.device)
    entries = table.reshape(-1).index_select(0, at)
    return Lists(_on_host(indptr, table.device), entries.to(torch.int32))


def _on_host(x: Ints, device: torch.device) -> Tensor:
    """int32 in host memory, from where a copy to `device` can be enqueued."""
    host = torch.tensor(x.astype(np.int32))
    return host if device.type == "cpu" else host.pin_memory()


def log_base(decodes: Decodes, pool_SGD: Tensor, heads: int, dtype: torch.dtype) -> float:
    """The base of a decode's log-sum-exp, measured: kernels differ in it. Reads the device.

    Args:
        pool_SGD: of keys, four slots or more, all finite. heads: query heads. dtype: of the queries.

    Raises:
        UnsupportedError: it is neither 2 nor e.
    """
    q_NHD = torch.zeros(1, heads, pool_SGD.shape[-1], dtype=dtype, device=pool_SGD.device)
    pages = pool_SGD[:, None]
    four = lists_of(torch.arange(4, device=pool_SGD.device), np.array([0]), np.array([4]))
    decode = four.planned(decodes, q_NHD, pages, 1.0)
    found = float(decode.run(q_NHD, (pages, pages), return_lse=True)[1].mean())  # four logits of 0
    for base in (2.0, math.e):
        if math.isclose(found, math.log(4, base), rel_tol=1e-3):
            return base
    raise UnsupportedError(f"the log-sum-exp of four equal logits is {found:.4f}: neither to base 2 nor to base e")


class RegionLists:
    """The regions of a forward's requests as lists, which all its layers share.

    Args:
        slots_BJ: rows of `req_to_token`, on the device. region_ends_BR: as of `attention_kernel.py`, on the host.
    """

    def __init__(self, slots_BJ: Tensor, region_ends_BR: Ints) -> None:
        self._batch, self._regions = region_ends_BR.shape
        width = slots_BJ.shape[1]
        starts_BR = np.pad(region_ends_BR[:, :-1], ((0, 0), (1, 0)))
        full = np.flatnonzero((region_ends_BR > starts_BR).ravel())  # others have no list
        request_N = full // self._regions
        begin_N, end_N = (x.ravel()[full] + request_N * width for x in (starts_BR, region_ends_BR))
        self._lists = lists_of(slots_BJ, begin_N, end_N)
        self._full_N, self._request_N = upload(np.stack([full, request_N]).astype(np.int64), slots_BJ.device)
        self._planned: tuple[float, PagedDecode] | None = None

    def summary(
        self, decodes: Decodes, q_BHD: Tensor, key_pool_SGD: Tensor, *, scaling: float, base: float
    ) -> AttentionSummary:
        """What `attention_kernel.attention_summary` gives of all heads, without top positions and first logits. One
        plan serves all layers of equal `scaling`, heads and dtypes.

        The mean logit has the rounding of the decode's output: with queries in bf16 that is a relative error of up to
        2**-9 of the sum of the products, not of the mean.

        Args:
            base: of the decode's log-sum-exp (`log_base`).
        """
        q_NHD, pages = q_BHD.index_select(0, self._request_N), key_pool_SGD[:, None]
        if self._planned is None or self._planned[0] != scaling:
            self._planned = scaling, self._lists.planned(decodes, q_NHD, pages, scaling)
        mean_key_NHD, lse_NH = self._planned[1].run(q_NHD, (pages, pages), return_lse=True)
        mean_NH = (mean_key_NHD.float() * q_NHD.float()).sum(-1) * scaling
        batch, heads, _ = q_BHD.shape
        return AttentionSummary(
            self._spread(lse_NH.float() * math.log(base), -math.inf),
            self._spread(mean_NH, 0.0),
            torch.empty((batch, heads, 0), dtype=torch.int32, device=q_BHD.device),
            torch.empty((batch, heads, 0), device=q_BHD.device),
        )

    def _spread(self, x_NH: Tensor, empty: float) -> Tensor:
        whole = x_NH.new_full((self._batch * self._regions, x_NH.shape[1]), empty).index_copy_(0, self._full_N, x_NH)
        return whole.view(self._batch, self._regions, -1).transpose(1, 2)


@dataclass(frozen=True)
class RegionDecode:
    """Decodes that were tried for telemetry, and the base of their log-sum-exp."""

    decodes: Decodes
    base: float

    @classmethod
    def tried(
        cls, decodes: Decodes, *, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> RegionDecode:
        """Measure the base, and compare weights by region with PyTorch's on random entries. Reads the device.

        Raises:
            UnsupportedError: they differ.
        """
        q, pool = (_random(n, h, head_dim, dtype, device) for n, h in ((2, heads), (64, kv_heads)))
        slots = torch.arange(63, -1, -1, device=device).view(2, 32)
        ends = np.array([[3, 3, 32], [1, 20, 31]])
        with _trying():
            base = log_base(decodes, pool, heads, dtype)
            found = RegionLists(slots, ends).summary(decodes, q, pool, scaling=head_dim**-0.5, base=base)
        on_device = (upload(x, device) for x in (ends[:, -1], ends, np.arange(heads)))
        true = attention_summary(q, pool, slots, *on_device, scaling=head_dim**-0.5, top_k=1)
        _agree("weights by region", found.mass(), true.mass())
        return cls(decodes, base)


def kept_lists(entry_BGJ: Tensor, kept_BG: Ints, width: int, after_B: Ints) -> Lists:
    """What each request and kv head reads: its kept positions, and those after the cache.

    Args:
        entry_BGJ: entries of one layer: kept ones first, padded to `width`, then those after.
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
    return Lists(_on_host(indptr, entry_BGJ.device), pieces.entries)


def attend_by_lists(
    decodes: Decodes, q_BHD: Tensor, k_SGD: Tensor, v_SGD: Tensor, lists: Lists, scaling: float
) -> Tensor:
    """One query of each request over the entries of `kept_lists`, `[B, H, D]`: `kept_attention.attend_one_query`."""
    batch, heads, dim = q_BHD.shape
    kv_heads = k_SGD.shape[1]
    q_NHD = q_BHD.reshape(batch * kv_heads, heads // kv_heads, dim)
    k_pages, v_pages = (pool.view(-1, 1, 1, dim) for pool in (k_SGD, v_SGD))
    out: Tensor = lists.planned(decodes, q_NHD, k_pages, scaling).run(q_NHD, (k_pages, v_pages))
    return out.reshape(batch, heads, dim)


def try_kept(
    decodes: Decodes, *, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> float:
    """The largest difference of `attend_by_lists` from `attend_one_query`, on random entries of which each kv head
    keeps some. Reads the device.

    Raises:
        UnsupportedError: it is more than rounding.
    """
    q, k, v = (_random(n, h, head_dim, dtype, device) for n, h in ((2, heads), (64, kv_heads), (65, kv_heads)))
    v, head = v[1:], torch.arange(kv_heads, device=device)
    slots_BJ = torch.arange(63, -1, -1, device=device).view(2, 32)
    counts, after = 1 + np.arange(2 * kv_heads).reshape(2, -1) % 28, np.array([3, 1])
    entry_BGJ = slots_BJ[:, None] * kv_heads + head[:, None]  # 28 columns that may be kept, 4 after them
    lists = kept_lists(entry_BGJ, counts, 28, after)
    with _trying():
        found = attend_by_lists(decodes, q, k, v, lists, head_dim**-0.5)
    j = np.arange(32)
    seen = (j < counts[..., None]) | ((j >= 28) & (j < 28 + after[:, None, None]))
    bias = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(upload(~seen, device), -torch.inf)
    k_BGJD, v_BGJD = (pool[slots_BJ].transpose(1, 2) for pool in (k, v))
    return _agree("kept sets", found, attend_one_query(q, k_BGJD, v_BGJD, bias, head_dim**-0.5))


@contextmanager
def _trying() -> Iterator[None]:
    """Whatever a kernel says of what it cannot do, as a refusal."""
    try:
        yield
    except UnsupportedError:
        raise
    except Exception as e:
        raise UnsupportedError(
            f"a paged decode over lists of cache entries does not run here: {type(e).__name__}: {e}",
            fix="leave out `by: lists` and kept sets, or use a dtype and a model that FlashInfer has a kernel for",
        ) from e


def _random(n: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(n, heads, dim, generator=torch.Generator().manual_seed(heads)).to(device, dtype)


def _agree(what: str, found: Tensor, true: Tensor) -> float:
    """The largest difference.

    Raises:
        UnsupportedError: it is more than rounding.
    """
    worst = float((found.float() - true.float()).abs().max())
    if not worst <= _OFF:
        raise UnsupportedError(
            f"{what} by lists of cache entries differ from PyTorch's by {worst:.3g} on random entries",
            fix="report it with the versions of SGLang and FlashInfer",
        )
    return worst
