"""Operators of ours have the bits of SGLang's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_probe.engine.releases import release

pytestmark = pytest.mark.skipif(not release().cpu_widens, reason="this release's platform uses SGLang's operators")

HEADS = [(8, 4, 32), (9, 3, 64)]
"""Query heads, KV heads and their width of probe-text and SmolLM2-135M."""


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def _rotary(width: int, dtype: torch.dtype, **changed: object) -> SimpleNamespace:
    """What `RotaryEmbedding.forward_native` reads of its instance, and itself."""
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
    from sglang.srt.layers.rotary_embedding.utils import apply_rotary_emb

    fields = {"head_size": width, "rotary_dim": width, "is_neox_style": True, **changed}
    op = SimpleNamespace(**fields, _apply_rotary_emb_wrapped=apply_rotary_emb)
    angles = torch.arange(512)[:, None] / 10000 ** (torch.arange(0, op.rotary_dim, 2) / op.rotary_dim)
    op.cos_sin_cache = torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
    op.forward_native = RotaryEmbedding.forward_native.__get__(op)
    return op


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), HEADS)
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_queries_and_keys_are_rotated_as_sglang_rotates_them(
    heads: int, kv_heads: int, width: int, tokens: int, dtype: torch.dtype
) -> None:
    from sglang_probe.engine.platform.operators import rotate

    op = _rotary(width, dtype)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width).to(dtype)
    q, k, _ = qkv.split([heads * width, kv_heads * width, kv_heads * width], dim=-1)
    positions = torch.randint(0, 512, (tokens,))
    given = qkv.clone()
    for ours, theirs in zip(rotate(op, positions, q, k), op.forward_native(positions, q, k), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(qkv, given), "what is rotated is a part of what the keys and values are read from"


@pytest.mark.parametrize("changed", [{"is_neox_style": False}, {"rotary_dim": 16}])
def test_another_rotation_is_left_to_sglang(changed: dict[str, object]) -> None:
    from sglang_probe.engine.platform.operators import rotate

    op = _rotary(32, torch.float32, **changed)
    q, k, positions = torch.randn(5, 256), torch.randn(5, 128), torch.arange(5)
    for ours, theirs in zip(rotate(op, positions, q, k), op.forward_native(positions, q, k), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activation_has_the_same_bits(dtype: torch.dtype) -> None:
    from sglang.srt.layers.activation import SiluAndMul

    from sglang_probe.engine.platform.operators import silu_and_mul

    x = torch.randn(300, 2 * 704).to(dtype)
    given = x.clone()
    assert torch.equal(silu_and_mul(None, x), SiluAndMul.forward_native(None, x))
    assert torch.equal(x, given)
