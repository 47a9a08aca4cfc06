"""A small model of FlashInfer's `BatchDecodeWithPagedKVCacheWrapper`: what its documentation says of `plan` and `run`.

It checks what the wrapper takes for granted: dtypes, an `indptr` that begins at zero and does not fall, page lengths
from 1 to the page size, pages that exist, and queries and pools of the planned heads, width and dtypes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class PagedDecode:
    """Args: base: of the log-sum-exp; FlashInfer's own kernels have 2."""

    def __init__(self, base: float = 2.0) -> None:
        self.base = base

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        sm_scale: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert len(indptr) == len(last_page_len) + 1
        assert int(indptr[0]) == 0
        assert int(indptr[-1]) == len(indices)
        assert bool((indptr.diff() >= 1).all())
        assert bool(((last_page_len >= 1) & (last_page_len <= page_size)).all())
        assert num_qo_heads % num_kv_heads == 0
        self.lists = [indices[a:b].long() for a, b in zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)]
        self.last, self.shape, self.page_size = (
            last_page_len.tolist(),
            (num_qo_heads, num_kv_heads, head_dim),
            page_size,
        )
        self.scale = 1 / math.sqrt(head_dim) if sm_scale is None else sm_scale
        self.dtypes = (q_data_type, kv_data_type or q_data_type)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, return_lse: bool = False) -> Any:
        heads, kv_heads, dim = self.shape
        assert tuple(q.shape) == (len(self.lists), heads, dim)
        for pool in paged_kv_cache:
            assert tuple(pool.shape[1:]) == (self.page_size, kv_heads, dim)
            assert (q.dtype, pool.dtype) == self.dtypes
        outputs, sums = [], []
        for i, (pages, last) in enumerate(zip(self.lists, self.last, strict=True)):
            assert int(pages.max()) < len(paged_kv_cache[0])
            length = (len(pages) - 1) * self.page_size + last
            k, v = (pool[pages].reshape(-1, kv_heads, dim)[:length].float() for pool in paged_kv_cache)
            group = q[i].float().view(kv_heads, heads // kv_heads, dim)
            logits = torch.einsum("ghd,jgd->ghj", group, k) * self.scale
            outputs.append(torch.einsum("ghj,jgd->ghd", torch.softmax(logits, -1), v).reshape(heads, dim))
            sums.append(torch.logsumexp(logits, -1).reshape(heads) / math.log(self.base))
        out = torch.stack(outputs).to(q.dtype)
        return (out, torch.stack(sums)) if return_lse else out
