"""A paged decode, whose pages are of one entry: attention of each query over a list of entries of a pool.

FlashInfer's `BatchDecodeWithPagedKVCacheWrapper`, which SGLang's backend of that name plans with such pages too
(`layers/attention/flashinfer_backend.py`), and a model of it in PyTorch operations for a CPU. Read in FlashInfer 0.7.2,
not run:

* `plan` copies what it is given to the host (`indptr`, `last_page_len`), so that both have to lie there already;
* its schedule goes to the device from pinned memory of the wrapper's own, enqueued. A second `plan` of the same wrapper
  would overwrite what is still to be copied (mini-sglang, pull request 103), so that `Decodes` has several.
"""

from __future__ import annotations

import importlib.util
import math
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sglang_probe.errors import UnsupportedError

_WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends for partial results."""
_TENSOR_CORES_FROM = 4
"""Query heads per kv head from which 16-bit queries are multiplied by tensor cores, as SGLang decides it
(`should_use_tensor_core`). The other kernel is compiled for some numbers of heads only."""


class PagedDecode(Protocol):
    """What is used of FlashInfer's wrapper, layout `NHD`. N queries, H query heads, G kv heads, D head dim."""

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
    ) -> Any:
        """Which pages each query reads: `indices[indptr[i] : indptr[i + 1]]`."""

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, return_lse: bool = False) -> Any:
        """Attention `[N, H, D]` of queries `[N, H, D]` over pools `[pages, page_size, G, D]`, in the dtype of the
        queries; and the log-sum-exp `[N, H]`, float32, to base 2 or e."""


class Decodes:
    """Decodes of one device, each planned again only once what its last plan enqueued has been copied.

    Args:
        make: makes another one. events: whether `plan` enqueues anything.
    """

    def __init__(self, make: Callable[[], PagedDecode], *, events: bool = False) -> None:
        self._make, self._events = make, events
        self._planned: deque[tuple[Any, PagedDecode]] = deque()

    def plan(self, *args: Any, **options: Any) -> PagedDecode:
        """A decode that was planned, with arguments as of `PagedDecode.plan`."""
        if self._planned and (self._planned[0][0] is None or self._planned[0][0].query()):
            decode = self._planned.popleft()[1]
        else:
            decode = self._make()
        decode.plan(*args, **options)
        event = None
        if self._events:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._planned.append((event, decode))
        return decode


def decodes_on(device: torch.device, dtype: torch.dtype, group: int) -> Decodes:
    """FlashInfer's decodes on a GPU, their model on a CPU.

    Args:
        dtype: of the queries. group: query heads per kv head.

    Raises:
        UnsupportedError: FlashInfer is not installed.
    """
    if device.type == "cpu":
        return Decodes(TorchDecode)
    if importlib.util.find_spec("flashinfer") is None:
        raise UnsupportedError(
            "attention over lists of cache entries is FlashInfer's paged decode, and FlashInfer is not installed",
            fix="install `flashinfer-python` as SGLang pins it; telemetry needs none with `by: kernel`",
        )
    wrapper = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    cores = dtype in (torch.bfloat16, torch.float16) and group >= _TENSOR_CORES_FROM
    return Decodes(lambda: wrapper(workspace, "NHD", backend="fa2", use_tensor_cores=cores), events=True)


class TorchDecode:
    """What FlashInfer documents of its wrapper, in PyTorch operations. It refuses what the wrapper takes for granted,
    as far as the host can see it.

    Args:
        base: of the log-sum-exp; FlashInfer's own kernels have 2.
    """

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
        """See `PagedDecode`.

        Raises:
            ValueError: a list is empty, or lists, dtypes, pages and heads do not fit together.
        """
        bounds = indptr.numpy()
        lengths = np.diff(bounds)
        dtypes = {x.dtype for x in (indptr, indices, last_page_len)}
        fits = len(bounds) == len(last_page_len) + 1 and bounds[0] == 0 and bounds[-1] == len(indices)
        if dtypes != {torch.int32} or not fits or (lengths < 1).any():
            raise ValueError(f"lists of {lengths.tolist()} entries in {dtypes} do not tile {len(indices)} of them")
        if page_size != 1 or (last_page_len.numpy() != 1).any() or num_qo_heads % num_kv_heads:
            raise ValueError(f"pages of {page_size}, {num_qo_heads} query heads for {num_kv_heads} kv heads")
        j = np.arange(lengths.max())
        self._seen_NJ = torch.tensor(j < lengths[:, None])
        at_NJ = bounds[:-1, None] + np.minimum(j, lengths[:, None] - 1)  # past a list: its last entry again
        self._entries_NJ = indices.index_select(0, torch.tensor(at_NJ.ravel())).view(at_NJ.shape)
        self._shape = (num_qo_heads, num_kv_heads, head_dim)
        self._scale = head_dim**-0.5 if sm_scale is None else sm_scale
        self._dtypes = (q_data_type, kv_data_type or q_data_type)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, return_lse: bool = False) -> Any:
        """See `PagedDecode`.

        Raises:
            ValueError: queries or pools are not those that were planned.
        """
        heads, kv_heads, dim = self._shape
        n, longest = self._entries_NJ.shape
        wrong = [p for p in paged_kv_cache if p.shape[1:] != (1, kv_heads, dim) or (q.dtype, p.dtype) != self._dtypes]
        if wrong or q.shape != (n, heads, dim):
            raise ValueError(f"queries {list(q.shape)} in {q.dtype}, planned were {n} of {heads} heads of {dim}")
        k_NJGD, v_NJGD = (
            pool.flatten(0, 1).index_select(0, self._entries_NJ.flatten()).view(n, longest, kv_heads, dim).float()
            for pool in paged_kv_cache
        )
        q_NGRD = q.float().view(n, kv_heads, heads // kv_heads, dim)
        logits = torch.einsum("ngrd,njgd->ngrj", q_NGRD, k_NJGD) * self._scale
        logits = logits.masked_fill(~self._seen_NJ[:, None, None], -torch.inf)
        out = torch.einsum("ngrj,njgd->ngrd", torch.softmax(logits, -1), v_NJGD).reshape(n, heads, dim).to(q.dtype)
        return (out, torch.logsumexp(logits, -1).reshape(n, heads) / math.log(self.base)) if return_lse else out
