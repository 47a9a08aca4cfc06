"""Attention weights recomputed from captured queries and keys, in float32 or better.

Shapes: N queries, H query heads, J keys, G kv heads, R = H / G query heads per kv head, D head dim. Any number of
leading axes (layers, requests) is allowed and all of them are batched. Query head h reads kv head h // R.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_probe.errors import ProbeError

_BLOCK_ELEMENTS = 1 << 25
"""Weights held at once by reductions over many queries: 128 MiB in float32."""


@dataclass(frozen=True)
class AttentionSpec:
    """How a model turns q·k into weights: `softmax(cap(scaling · q·k))` over the visible keys."""

    scaling: float
    softcap: float | None = None
    """Logits become `softcap · tanh(logits / softcap)` (Gemma 2)."""
    sliding_window: int | None = None
    """A query at index i sees keys i - sliding_window + 1 … i."""


def attention_weights(q_NHD: Tensor, k_JGD: Tensor, spec: AttentionSpec, *, first: int) -> Tensor:
    """Weights `[..., G, R, N, J]`; query row n has causal index `first + n` and sees the keys up to that index.

    With `first >= J` all keys are visible to all rows: that is the softmax over the prompt alone of queries after it.

    Raises:
        ProbeError: the number of query heads is not a multiple of the number of kv heads, or a row sees no key.
    """
    logits = attention_logits(q_NHD, k_JGD, spec)
    seen = visible(q_NHD.shape[-3], k_JGD.shape[-3], spec, first=first, device=q_NHD.device)
    if not bool(seen.any(-1).all()):
        raise ProbeError("a query sees no key", fix="check the causal index of the queries and the sliding window")
    return torch.softmax(logits.masked_fill(~seen, -torch.inf), -1)


def attention_logits(q_NHD: Tensor, k_JGD: Tensor, spec: AttentionSpec) -> Tensor:
    """Scaled and soft-capped q·k without a mask, `[..., G, R, N, J]`."""
    heads, kv_heads = q_NHD.shape[-2], k_JGD.shape[-2]
    if heads % kv_heads:
        raise ProbeError(f"{heads} query heads cannot share {kv_heads} kv heads evenly")
    dtype = torch.promote_types(q_NHD.dtype, torch.float32)
    q_GRND = torch.unflatten(q_NHD.to(dtype), -2, (kv_heads, heads // kv_heads)).movedim(-4, -2)
    k_GDJ = k_JGD.to(dtype).movedim(-3, -1)
    flat = q_GRND.flatten(-3, -2) @ k_GDJ * spec.scaling
    if spec.softcap is not None:
        flat = spec.softcap * torch.tanh(flat / spec.softcap)
    return torch.unflatten(flat, -2, q_GRND.shape[-3:-1])


def visible(n: int, j: int, spec: AttentionSpec, *, first: int, device: torch.device | None = None) -> Tensor:
    """Which keys each query row may attend to, bool `[N, J]`."""
    row = torch.arange(first, first + n, device=device)[:, None]
    key = torch.arange(j, device=device)
    seen = key <= row
    return seen if spec.sliding_window is None else seen & (key > row - spec.sliding_window)


def attention_blocks(q_NHD: Tensor, k_JGD: Tensor, spec: AttentionSpec, *, first: int) -> Iterator[tuple[int, Tensor]]:
    """`attention_weights` in blocks of query rows, each with the index of its first row, within bounded memory."""
    n, j = q_NHD.shape[-3], k_JGD.shape[-3]
    rows = max(1, _BLOCK_ELEMENTS // max(1, q_NHD[..., 0].numel() // n * j))
    for start in range(0, n, rows):
        yield start, attention_weights(q_NHD[..., start : start + rows, :, :], k_JGD, spec, first=first + start)


def attention_received(q_NHD: Tensor, k_JGD: Tensor, spec: AttentionSpec, *, first: int) -> Tensor:
    """Sum over the query rows of the weight each key receives, `[..., G, R, J]`."""
    return torch.stack([a.sum(-2) for _, a in attention_blocks(q_NHD, k_JGD, spec, first=first)]).sum(0)
