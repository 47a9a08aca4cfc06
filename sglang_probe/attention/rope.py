"""Rotary position embedding: the tables an engine uses, rotation, and its exact inverse.

The tables are computed in float32, as engines compute theirs, because the inverse must undo what was done; the rotation
itself runs in at least float32. Source: Su et al., arXiv 2104.09864; `llama3` scaling as in Llama 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sglang_probe.config import Config
from sglang_probe.errors import ProbeError


class Llama3Scaling(Config):
    """Frequency scaling of Llama 3.1: long wavelengths are stretched by `factor`, a band between is interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class Rotary(Config):
    """How a model rotates queries and keys."""

    head_dim: int
    base: float = 10000.0
    rotary_dim: int | None = None
    """Number of leading dimensions that are rotated; None means all."""
    layout: Literal["half", "interleaved"] = "half"
    """`half`: dimension i is paired with i + rotary_dim/2 (Llama, Qwen, Gemma); `interleaved`: 2i with 2i+1 (GPT-J)."""
    linear_factor: float = Field(default=1.0, gt=0)
    llama3: Llama3Scaling | None = None
    attention_factor: float = Field(default=1.0, gt=0)
    """Scale `m` that some tables carry (YaRN, longrope). The inverse divides by it, so that it is exact."""

    @model_validator(mode="after")
    def _even(self) -> Rotary:
        if self.dim % 2 or self.dim > self.head_dim:
            raise ValueError(f"rotary_dim must be even and at most head_dim, found {self.dim} of {self.head_dim}")
        return self

    @property
    def dim(self) -> int:
        """Number of rotated dimensions."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def frequencies(self) -> Tensor:
        """Angle per position of each pair, float32 `[dim / 2]`."""
        exponent = torch.arange(0, self.dim, 2, dtype=torch.int64).to(torch.float32) / self.dim
        freq = 1.0 / (self.base**exponent) / self.linear_factor
        return freq if self.llama3 is None else _llama3(freq, self.llama3)

    def tables(self, positions_N: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of each pair, float32 `[..., N, dim / 2]` for integer positions `[..., N]`."""
        angle = positions_N.to(torch.float32)[..., None] * self.frequencies().to(positions_N.device)
        return angle.cos() * self.attention_factor, angle.sin() * self.attention_factor

    def rotate(self, x_NHD: Tensor, positions_N: Tensor) -> Tensor:
        """Post-RoPE rows of pre-RoPE rows `[..., N, H, D]` at `positions_N`, in at least float32."""
        cos, sin = self.tables(positions_N)
        return self.turn(x_NHD, cos[..., None, :], sin[..., None, :])

    def unrotate(self, x_NHD: Tensor, positions_N: Tensor) -> Tensor:
        """Pre-RoPE rows of post-RoPE rows `[..., N, H, D]`: the inverse of `rotate` up to rounding.

        Rows that were stored in bf16 keep their rounding error, about 2^-8 per element.
        """
        cos, sin = self.tables(positions_N)
        # The rounded cos and sin of a pair are not exactly on a circle; dividing by their norm inverts what was
        # applied.
        square = cos.double() ** 2 + sin.double() ** 2
        return self.turn(x_NHD, (cos / square)[..., None, :], (-sin / square)[..., None, :])

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply a 2x2 block `[[cos, -sin], [sin, cos]]` to each pair of the last axis; the tables broadcast.

        The tables need not be a rotation: the mean rotation over many positions is applied in the same way. With
        float64 tables the product runs in float64 and the result has the dtype of `x`, at least float32.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        work = torch.promote_types(dtype, cos.dtype)
        y = x.to(work)
        first, second = self.pairs(y)
        cos, sin = cos.to(work), sin.to(work)
        turned = (first * cos - second * sin, second * cos + first * sin)
        head = torch.cat(turned, -1) if self.layout == "half" else torch.stack(turned, -1).flatten(-2)
        return torch.cat([head, y[..., self.dim :]], -1).to(dtype)

    def pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two members of each rotated pair, `[..., dim / 2]` each."""
        head = x[..., : self.dim]
        if self.layout == "half":
            return head[..., : self.dim // 2], head[..., self.dim // 2 :]
        return head[..., 0::2], head[..., 1::2]

    @classmethod
    def from_model_config(cls, config: Mapping[str, Any]) -> Rotary:
        """Read a model's `config.json`: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.

        Raises:
            ProbeError: a scaling type whose tables this file does not reproduce.
        """
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        values: dict[str, Any] = {
            "head_dim": head_dim,
            "base": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
            "rotary_dim": None if partial == 1.0 else int(head_dim * partial),
        }
        if kind == "linear":
            values["linear_factor"] = rope["factor"]
        elif kind == "llama3":
            values["llama3"] = Llama3Scaling(**{k: rope[k] for k in Llama3Scaling.model_fields})
        elif kind != "default":
            raise ProbeError(
                f"rope scaling `{kind}` is not supported", fix="capture pre-RoPE queries instead of un-rotating them"
            )
        return cls(**values)


def _llama3(freq: Tensor, s: Llama3Scaling) -> Tensor:
    wavelength = 2 * math.pi / freq
    low, high = (s.original_max_position_embeddings / f for f in (s.low_freq_factor, s.high_freq_factor))
    ramp = s.original_max_position_embeddings / wavelength - s.low_freq_factor
    ramp = ramp / (s.high_freq_factor - s.low_freq_factor)
    between = (1 - ramp) * freq / s.factor + ramp * freq
    return torch.where(wavelength > low, freq / s.factor, torch.where(wavelength < high, freq, between))
