"""Steps that several scorers share: pooling over positions, reduction over the query heads of a group, value norms."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from sglang_probe.attention.weights import attention_weights
from sglang_probe.errors import ProbeError
from sglang_probe.eviction.layer import Layer, Queries

Pooling = Literal["none", "avg", "max"]
GroupReduction = Literal["mean", "max", "sum"]
Order = Literal["pool_then_group", "group_then_pool"]
"""Whether pooling over positions comes before the reduction over the group. With max-pooling the order matters."""
Softmax = Literal["prompt", "visible"]
"""What a lookahead query's softmax runs over: the prompt alone, or also the lookahead tokens it would see."""


def pool(x: Tensor, kind: Pooling, kernel: int) -> Tensor:
    """Pool over the last axis, same length. Average pooling counts zeros outside the range, as published code does."""
    if kind == "none" or x.shape[-1] == 0:
        return x
    if kernel % 2 == 0:
        raise ProbeError(f"a pooling kernel of {kernel} cannot keep the length", fix="use an odd kernel")
    flat = x.reshape(-1, 1, x.shape[-1])
    pooled = (
        functional.max_pool1d(flat, kernel, stride=1, padding=kernel // 2)
        if kind == "max"
        else functional.avg_pool1d(flat, kernel, stride=1, padding=kernel // 2)
    )
    return pooled.reshape(x.shape)


def reduce_group(x_GRL: Tensor, how: GroupReduction) -> Tensor:
    """One score per kv head from those of its query heads, `[..., G, R, L]` to `[..., G, L]`."""
    if how == "max":
        return x_GRL.amax(-2)
    return x_GRL.mean(-2) if how == "mean" else x_GRL.sum(-2)


def pool_and_reduce(
    x_GRL: Tensor, *, pooling: Pooling, kernel: int, gqa: GroupReduction, order: Order, recent: int
) -> Tensor:
    """Scores `[..., G, L]` of attention sums; the last `recent` positions are neither pooled nor pooled from.

    Those are always kept, and a large weight on the last token must not spill over to its neighbours before the window.
    """
    cut = max(0, x_GRL.shape[-1] - recent)
    old, new = x_GRL[..., :cut], x_GRL[..., cut:]
    if order == "pool_then_group":
        scores = reduce_group(pool(old, pooling, kernel), gqa)
    else:
        scores = pool(reduce_group(old, gqa), pooling, kernel)
    return torch.cat([scores, reduce_group(new, gqa)], -1)


def lookahead_attention(layer: Layer, queries: Queries, softmax: Softmax) -> Tensor:
    """Weights of lookahead queries over the prompt, `[..., G, R, n, L]`.

    All rows see the whole prompt. With `visible` the softmax also runs over the keys of the lookahead tokens up to the
    row's own, so that a row sums to less than 1 over the prompt.
    """
    if softmax == "prompt":
        return attention_weights(queries.q_THD, layer.k_LGD, layer.spec, first=layer.length)
    if queries.k_TGD is None:
        raise ProbeError(
            "the softmax over visible keys needs the keys of the lookahead tokens",
            fix="capture them as Queries.k_TGD, or set `softmax: prompt`",
        )
    keys = torch.cat([layer.k_LGD, queries.k_TGD], -3)
    return attention_weights(queries.q_THD, keys, layer.spec, first=layer.length)[..., : layer.length]


def value_norms(layer: Layer, *, projected: bool) -> Tensor:
    """Norm of the values by query head, `[..., G, R, L]`: L2 of v, or L1 of v W_O (CriticalKV's measure)."""
    v_LGD = layer.require("v_LGD")
    dtype = torch.promote_types(v_LGD.dtype, torch.float32)
    v_GLD = v_LGD.to(dtype).movedim(-3, -2)
    if not projected:
        return v_GLD.norm(dim=-1)[..., None, :].expand(*v_GLD.shape[:-2], layer.group, layer.length)
    w_o_GRDM = torch.unflatten(layer.require("w_o_HDM").to(dtype), -3, (layer.kv_heads, layer.group))
    return (v_GLD[..., None, :, :] @ w_o_GRDM).abs().sum(-1)
