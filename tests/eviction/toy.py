"""Small random layers, and attention computed entry by entry with nothing of the package."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sglang_probe.attention.rope import Rotary
from sglang_probe.attention.weights import AttentionSpec
from sglang_probe.eviction import Layer, Queries

LENGTH, STEPS, HEADS, KV_HEADS, DIM, WIDTH = 12, 5, 4, 2, 4, 6
SPEC = AttentionSpec(scaling=0.5)


def toy(seed: int = 0, *, length: int = LENGTH, spec: AttentionSpec = SPEC, **replaced: Any) -> Layer:
    """A layer in float64 with everything that any method asks for; attention is peaked enough for clear ranks."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return 1.5 * torch.randn(shape, generator=g, dtype=torch.float64)

    def queries(n: int) -> Queries:
        return Queries(rand(n, HEADS, DIM), rand(n, KV_HEADS, DIM), rand(n, KV_HEADS, DIM))

    values: dict[str, Any] = {
        "q_NHD": rand(length, HEADS, DIM),
        "k_LGD": rand(length, KV_HEADS, DIM),
        "v_LGD": rand(length, KV_HEADS, DIM),
        "w_o_HDM": rand(HEADS, DIM, WIDTH),
        "rotary": Rotary(head_dim=DIM),
        "lookahead": {name: queries(3) for name in ("laq", "dapq", "speckv")},
        "future": queries(STEPS),
        "needed_L": torch.arange(length) % 5 == 2,
        "num_layers": 4,
        "index": torch.tensor(seed % 4),
        "request": torch.tensor(seed),
    }
    return Layer(spec=spec, **{**values, **replaced})


def weights(q: Tensor, keys: Tensor, scaling: float, last: int) -> list[float]:
    """Attention of one query vector `[D]` over keys `[J, D]` up to index `last`, later ones 0."""
    logits = [scaling * sum(float(a) * float(b) for a, b in zip(q, k, strict=True)) for k in keys[: last + 1]]
    e = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(e) for x in e] + [0.0] * (len(keys) - last - 1)


def prompt_rows(layer: Layer, head: int) -> list[list[float]]:
    """Attention of every prompt query of one query head."""
    k = layer.k_LGD[:, head // layer.group]
    return [weights(layer.q_NHD[i, head], k, layer.spec.scaling, i) for i in range(layer.length)]


def behind_rows(layer: Layer, queries: Queries, head: int, *, own_keys: bool) -> list[list[float]]:
    """Attention over the prompt of queries behind it, the softmax with or without their own keys."""
    k = layer.k_LGD[:, head // layer.group]
    n = len(queries.q_THD)
    if own_keys:
        assert queries.k_TGD is not None
        k = torch.cat([k, queries.k_TGD[:, head // layer.group]])
    rows = [
        weights(queries.q_THD[t, head], k, layer.spec.scaling, layer.length + t if own_keys else layer.length - 1)
        for t in range(n)
    ]
    return [r[: layer.length] for r in rows]
