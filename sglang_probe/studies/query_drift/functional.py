"""Functional drift: the part of a query's change that reaches the attention weights."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_probe.attention.weights import AttentionSpec, attention_logits


def functional_drift(decode_THD: Tensor, window_NHD: Tensor, k_LGD: Tensor) -> Tensor:
    """`‖(q_t - q̄_W) (K - k̄)ᵀ‖ / (sqrt(D) sqrt(L))` with post-RoPE queries and keys, `[..., T, H]`.

    The root mean square change of the logits over the prompt keys. A change common to all keys is removed, because a
    softmax does not see it. q̄_W is the plain mean of the window queries, whose length matters here.
    """
    dtype = torch.promote_types(decode_THD.dtype, torch.float32)
    change = decode_THD.to(dtype) - window_NHD.to(dtype).mean(-3, keepdim=True)
    k = k_LGD.to(dtype)
    spec = AttentionSpec(scaling=k.shape[-1] ** -0.5)
    logits_GRTL = attention_logits(change, k - k.mean(-3, keepdim=True), spec)
    return logits_GRTL.square().mean(-1).sqrt().flatten(-3, -2).mT
