"""Attention of queries that each see a kept set of positions per kv head. Pure functions of tensors.

Shapes: B requests, N queries of one request, H query heads, G kv heads, D head dim, J columns of keys, L positions.
Query head h reads kv head h // (H / G).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sglang_probe import bf16

if TYPE_CHECKING:
    from sglang_probe.kept_set import Kept


def attend_one_query(
    q_BHD: Tensor, k_BGJD: Tensor, v_BGJD: Tensor, bias_BGJ: Tensor | None, scaling: float | None
) -> Tensor:
    """One query of each request over its columns, `[B, H, D]`.

    Args:
        bias_BGJ: added to the logits, `-inf` at padding; None: no column is padding.
    """
    batch, heads, dim = q_BHD.shape
    kv_heads = k_BGJD.shape[1]
    out = bf16.attention(
        q_BHD.view(batch, kv_heads, heads // kv_heads, dim),
        k_BGJD,
        v_BGJD,
        attn_mask=None if bias_BGJ is None else bias_BGJ[:, :, None, :],
        scale=scaling,
    )
    return out.reshape(batch, heads, dim)


def attend_masked(q_NHD: Tensor, k_LGD: Tensor, v_LGD: Tensor, seen_GNL: Tensor, scaling: float | None) -> Tensor:
    """Queries of one request, each over the positions that its kv head may see, `[N, H, D]`."""
    group = q_NHD.shape[1] // k_LGD.shape[1]
    out_HND = bf16.attention(
        q_NHD.transpose(0, 1)[None],
        k_LGD.transpose(0, 1)[None].to(q_NHD.dtype),
        v_LGD.transpose(0, 1)[None].to(q_NHD.dtype),
        attn_mask=seen_GNL.repeat_interleave(group, 0)[None],
        enable_gqa=group > 1,
        scale=scaling,
    )[0]
    return out_HND.transpose(0, 1)


def seen_behind_cache(kept: Kept, layer: int, start: int, end: int) -> Tensor:
    """What queries at positions `[start, end)` after the cache may see, bool `[G, end - start, end]`."""
    of_cache = torch.stack([kept.at(p)[layer] for p in range(start, end)], 1)
    behind = torch.arange(kept.length, end)
    causal = behind[None, :] <= torch.arange(start, end)[:, None]
    return torch.cat([of_cache, causal.expand(len(of_cache), *causal.shape)], -1)
