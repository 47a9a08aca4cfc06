"""What one layer's attention saw for one request: the input of every eviction method.

Shapes: L prompt positions, N captured prompt queries (the last N), T decode steps, H query heads, G kv heads, R = H /
G, D head dim, M model width. Leading axes for layers or requests are added by `stack` and every method batches over
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sglang_probe.attention.rope import Rotary
from sglang_probe.attention.weights import AttentionSpec, attention_weights
from sglang_probe.errors import ProbeError


@dataclass(frozen=True)
class Queries:
    """Queries after the prompt: lookahead tokens, or the decode steps themselves."""

    q_THD: Tensor
    """Post-RoPE."""
    k_TGD: Tensor | None = None
    """Keys of the same tokens, where they are part of what the queries attend to."""
    v_TGD: Tensor | None = None
    skip: int = 0
    """Leading rows that are context only and are not scored (the question of a query-hidden protocol)."""


@dataclass(frozen=True)
class Layer:
    """One layer of one request, or a stack of them that agree in shape."""

    q_NHD: Tensor
    """Post-RoPE queries of the last N prompt positions."""
    k_LGD: Tensor
    """Post-RoPE keys of all prompt positions."""
    spec: AttentionSpec
    v_LGD: Tensor | None = None
    q_pre_NHD: Tensor | None = None
    """Queries before RoPE and after q-norm; un-rotated from `q_NHD` when absent and `rotary` is given."""
    rotary: Rotary | None = None
    w_o_HDM: Tensor | None = None
    """Output projection by query head: the layer adds `sum_h o_h @ w_o[h]` to the residual stream."""
    index: Tensor = field(default_factory=lambda: torch.tensor(0))
    """Layer number, with the leading axes as shape."""
    num_layers: int = 1
    request: Tensor = field(default_factory=lambda: torch.tensor(0))
    """Request number, with the leading axes as shape; it decorrelates the draws of random policies."""
    lookahead: Mapping[str, Queries] = field(default_factory=dict)
    """Lookahead or pseudo queries by the name that a method asks for (`laq`, `dapq`, `speckv`)."""
    future: Queries | None = None
    """The decode steps of the full-cache run: what metrics judge by and oracles leak."""
    needed_L: Tensor | None = None
    """Which prompt positions the answer needs, bool."""

    def __post_init__(self) -> None:
        if self.q_NHD.shape[-3] > self.length:
            raise ProbeError(f"{self.q_NHD.shape[-3]} prompt queries for {self.length} prompt positions")
        if self.q_NHD.shape[-2] % self.kv_heads:
            raise ProbeError(f"{self.q_NHD.shape[-2]} query heads cannot share {self.kv_heads} kv heads evenly")

    @property
    def length(self) -> int:
        """Number of prompt positions L."""
        return self.k_LGD.shape[-3]

    @property
    def kv_heads(self) -> int:
        """Number of kv heads G."""
        return self.k_LGD.shape[-2]

    @property
    def group(self) -> int:
        """Query heads per kv head R."""
        return self.q_NHD.shape[-2] // self.kv_heads

    @property
    def shape_GL(self) -> tuple[int, ...]:
        """Shape of scores: leading axes, kv heads, prompt positions."""
        return (*self.k_LGD.shape[:-3], self.kv_heads, self.length)

    def last_queries(self, n: int) -> Tensor:
        """Post-RoPE queries of the last `n` prompt positions (all of a shorter prompt), `[..., n, H, D]`.

        Raises:
            ProbeError: fewer were captured.
        """
        n = min(n, self.length)
        captured = self.q_NHD.shape[-3]
        if captured < n:
            raise ProbeError(
                f"{n} prompt queries are needed and {captured} of {self.length} were captured",
                fix="capture queries of a longer window, or of the whole prompt",
            )
        return self.q_NHD[..., captured - n :, :, :]

    def prompt_attention(self, n: int) -> Tensor:
        """Weights of the last `n` prompt queries over the prompt, `[..., G, R, n, L]`."""
        q = self.last_queries(n)
        return attention_weights(q, self.k_LGD, self.spec, first=self.length - q.shape[-3])

    def pre_rope_queries(self) -> Tensor:
        """Pre-RoPE queries of the whole prompt, `[..., L, H, D]`."""
        q = self.last_queries(self.length)
        if self.q_pre_NHD is not None:
            return self.q_pre_NHD
        return self.require("rotary").unrotate(q, torch.arange(self.length, device=q.device))

    def require(self, name: str) -> Any:
        """A field that a method cannot do without.

        Raises:
            ProbeError: it was not captured.
        """
        value = getattr(self, name)
        if value is None:
            raise ProbeError(f"`{name}` is needed and was not captured", fix=f"give `{name}` to the Layer")
        return value

    def lookahead_queries(self, name: str, n: int) -> Queries:
        """The first `n` lookahead queries of that name, or all where fewer were generated (an early end of text).

        Raises:
            ProbeError: there are none of that name.
        """
        if name not in self.lookahead:
            raise ProbeError(
                f"lookahead queries `{name}` are needed; there are {sorted(self.lookahead) or 'none'}",
                fix="generate them through the engine and give them as Layer.lookahead",
            )
        q = self.lookahead[name]
        return Queries(q.q_THD[..., :n, :, :], None if q.k_TGD is None else q.k_TGD[..., :n, :, :])

    @cached_property
    def future_attention(self) -> Tensor:
        """Full-cache weights of the scored decode steps over prompt and generated keys, `[..., G, R, T, L + T]`."""
        future: Queries = self.require("future")
        keys = torch.cat([self.k_LGD, _present(future.k_TGD, "future.k_TGD")], -3)
        a = attention_weights(future.q_THD, keys, self.spec, first=self.length)
        return a[..., future.skip :, :]

    @cached_property
    def future_values(self) -> Tensor:
        """Values behind `future_attention`, `[..., L + T, G, D]`."""
        future: Queries = self.require("future")
        return torch.cat([self.require("v_LGD"), _present(future.v_TGD, "future.v_TGD")], -3)

    def per_query_head(self) -> Layer:
        """The same layer with keys and values repeated for each query head, as code that evicts per query head has it.

        Methods then score every query head alone; the kept entries cost R times the bytes.
        """
        r = self.group

        def repeat(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.repeat_interleave(r, -2)

        def wide(q: Queries) -> Queries:
            return replace(q, k_TGD=repeat(q.k_TGD), v_TGD=repeat(q.v_TGD))

        return replace(
            self,
            k_LGD=self.k_LGD.repeat_interleave(r, -2),
            v_LGD=repeat(self.v_LGD),
            lookahead={n: wide(q) for n, q in self.lookahead.items()},
            future=None if self.future is None else wide(self.future),
        )


def stack(layers: Sequence[Layer]) -> Layer:
    """Layers that agree in shape, along a new first axis.

    Raises:
        ProbeError: they differ in what was captured, in shape, or in how attention is computed; group them first.
    """
    first = layers[0]
    for name in ("spec", "rotary", "num_layers"):
        if any(getattr(x, name) != getattr(first, name) for x in layers):
            raise ProbeError(f"layers that differ in `{name}` cannot be stacked", fix="group them and stack each group")
    try:
        return _stack(layers)
    except (RuntimeError, TypeError, KeyError) as e:
        raise ProbeError(f"layers cannot be stacked: {e}", fix="stack layers of equal shape and content") from e


def _stack(items: Sequence[Any]) -> Any:
    first = items[0]
    if isinstance(first, Tensor):
        return torch.stack(list(items))
    if isinstance(first, Mapping):
        if any(x.keys() != first.keys() for x in items):
            raise KeyError("they hold different lookahead queries")
        return {k: _stack([x[k] for x in items]) for k in first}
    if isinstance(first, Layer | Queries):
        return type(first)(**{f.name: _stack([getattr(x, f.name) for x in items]) for f in fields(first)})
    if any(x != first for x in items):
        raise TypeError(f"{first!r} beside other values")
    return first


def _present(x: Tensor | None, name: str) -> Tensor:
    if x is None:
        raise ProbeError(f"`{name}` is needed and was not captured", fix="capture keys and values of decode steps too")
    return x
