"""What a kept set costs in memory, so that methods are compared at equal bytes and not at equal names of budgets."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sglang_probe.eviction.base import Selection

Storage = Literal["kv_head", "masked", "paged"]
"""`kv_head`: only kept entries are stored, per head. `masked`: nothing is freed. `paged`: heads share pages, so a page
stays while any head of the layer keeps a position in it."""


@dataclass(frozen=True)
class Cost:
    """Memory of the prompt's keys and values over the layers and heads given."""

    kept: int
    """Kept entries, summed over layers and kv heads."""
    tokens_per_head: float
    """b: kept entries per layer and head, always-kept ones included."""
    share: float
    """b / L."""
    bytes: int
    bytes_full: int
    """Without eviction, stored once per kv head."""
    bytes_peak: int
    """While scoring: the whole prompt, and `extra_tokens` in every head."""

    def as_dict(self) -> dict[str, float]:
        """All fields and `bytes_share`."""
        return {**asdict(self), "bytes_share": self.bytes / self.bytes_full}


def cost(
    selection: Selection,
    *,
    head_dim: int,
    itemsize: int,
    storage: Storage = "kv_head",
    page: int = 1,
    group: int = 1,
    extra_tokens: int = 0,
) -> Cost:
    """Bytes of a selection: entries times 2 · head_dim · itemsize.

    Args:
        selection: one that evicts, or a selection that only reads less, which stores everything.
        head_dim: D of keys and of values.
        itemsize: bytes per element.
        storage: see `Storage`; a selection that does not evict is `masked`.
        page: positions per page of `paged` storage.
        group: query heads per kv head, where the selection was made per query head (`Layer.per_query_head`) and each
            stores its own copy; 1 otherwise. Only the full cache is counted without the copies.
        extra_tokens: lookahead, pseudo or soft tokens held while scoring.
    """
    keep_TGL = selection.keep_TGL
    entry = 2 * head_dim * itemsize
    length = keep_TGL.shape[-1]
    heads = keep_TGL[..., 0, :, 0].numel()
    kept = keep_TGL.sum() / keep_TGL.shape[-3]
    if storage == "masked" or not selection.evicts:
        stored = heads * length
    elif storage == "paged":
        stored = _paged(selection.keep_GL, page)
    else:
        stored = int(kept)
    return Cost(
        kept=int(kept),
        tokens_per_head=float(kept) / heads,
        share=float(kept) / heads / length,
        bytes=stored * entry,
        bytes_full=heads * length * entry // group,
        bytes_peak=heads * (length + extra_tokens) * entry,
    )


def _paged(keep_GL: Tensor, page: int) -> int:
    """Entries held when all heads of a layer share pages; the last page counts as the positions it has."""
    union_XL = keep_GL.any(-2).flatten(0, -2) if keep_GL.dim() > 2 else keep_GL.any(-2)[None]
    sizes = torch.bincount(torch.arange(keep_GL.shape[-1]) // page)
    pages = torch.unflatten(functional.pad(union_XL, (0, -keep_GL.shape[-1] % page)), -1, (-1, page)).any(-1)
    return int((pages * sizes).sum()) * keep_GL.shape[-2]
