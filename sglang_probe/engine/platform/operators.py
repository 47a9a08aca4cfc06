"""SGLang's operators in PyTorch with fewer passes over memory and fewer copies, and the same bits.

What an out-of-tree platform registers takes the place of an operator's `forward_native` (`kernels/fused_op.py`). The
order of every sum and product is that of SGLang's code, so that nothing is rounded elsewhere: `test_operators.py`
compares bits.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from torch import Tensor


def register(platform_key: str) -> None:
    """Use them on the platform of this dispatch key."""
    BaseFusedOp.register_oot_forward(SiluAndMul, silu_and_mul, platform_key)
    BaseFusedOp.register_oot_forward(RotaryEmbedding, rotate, platform_key)


def silu_and_mul(_op: Any, x: Tensor) -> Tensor:
    """As `SiluAndMul.forward_native`, the product in place."""
    half = x.shape[-1] // 2
    return torch.nn.functional.silu(x[..., :half]).mul_(x[..., half:])


def rotate(
    op: Any, positions: Tensor, query: Tensor, key: Tensor, offsets: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """As `RotaryEmbedding.forward_native`: of whole heads, in halves; everything else is left to it.

    `x1 cos - x2 sin` and `x2 cos + x1 sin` are `x cos + roll(x) (-sin, sin)` over whole heads: two products and a sum
    of each number, as there.
    """
    if (
        not op.is_neox_style
        or op.rotary_dim != op.head_size
        or offsets is not None
        or any(value is not None for value in options.values())
        or hasattr(op, "sin_cos_cache")
    ):
        result: tuple[Tensor, Tensor] = op.forward_native(positions, query, key, offsets, **options)
        return result
    cos, sin = op.cos_sin_cache.index_select(0, positions.flatten()).chunk(2, dim=-1)
    cos_N1D = torch.cat((cos, cos), dim=-1)[:, None].to(query.dtype)
    sin_N1D = torch.cat((-sin, sin), dim=-1)[:, None].to(query.dtype)
    return _rotated(query, cos_N1D, sin_N1D), _rotated(key, cos_N1D, sin_N1D)


def _rotated(x: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
    x_NHD = x.view(len(cos_N1D), -1, cos_N1D.shape[-1])
    turned = x_NHD.roll(x_NHD.shape[-1] // 2, -1).mul_(sin_N1D)
    return torch.mul(x_NHD, cos_N1D).add_(turned).reshape(x.shape)
