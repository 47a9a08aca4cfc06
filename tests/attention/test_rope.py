"""Rotation and its inverse, the frequency tables, and what the configuration of a model says."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from sglang_probe.attention.rope import Llama3Scaling, Rotary
from sglang_probe.errors import ProbeError

LLAMA3 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
ROTARIES = [
    Rotary(head_dim=16),
    Rotary(head_dim=16, rotary_dim=8, layout="interleaved"),
    Rotary(head_dim=128, base=500000.0, llama3=LLAMA3),
    Rotary(head_dim=16, linear_factor=4.0, attention_factor=1.3),
]


@pytest.mark.parametrize("rotary", ROTARIES, ids=range(len(ROTARIES)))
def test_unrotating_is_the_exact_inverse_in_float64(rotary: Rotary) -> None:
    x = torch.randn(50, 3, rotary.head_dim, dtype=torch.float64)
    at = torch.randint(0, 131072, (50,))
    turned = rotary.rotate(x, at)
    assert not torch.allclose(turned, x, atol=0.1)
    torch.testing.assert_close(rotary.unrotate(turned, at), x, rtol=0, atol=1e-14)
    wrong = rotary.unrotate(turned, at + 1)
    assert (wrong - x).abs().max() > 0.1


def test_the_round_trip_error_of_bf16_rows_is_the_rounding_of_bf16() -> None:
    rotary = Rotary(head_dim=64)
    x, at = torch.randn(200, 2, 64), torch.arange(200)
    back = rotary.unrotate(rotary.rotate(x, at).bfloat16(), at)
    error = (back - x).norm(dim=-1) / x.norm(dim=-1)
    assert 2**-11 < error.mean() < 2**-8


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
        {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3.model_dump()},
    ],
    ids=lambda r: r["rope_type"],
)
def test_rotation_is_that_of_transformers(rope: dict[str, float]) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=rope)
    at = torch.tensor([0, 1, 7, 100, 4000])
    q = torch.randn(1, 2, 5, 16)
    cos, sin = LlamaRotaryEmbedding(config)(q, at[None])
    expected = apply_rotary_pos_emb(q, q, cos, sin)[0][0].transpose(0, 1)
    ours = Rotary.from_model_config(config.to_dict()).rotate(q[0].transpose(0, 1), at)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_relative_distance_alone() -> None:
    rotary = Rotary(head_dim=8)
    q, k = torch.randn(1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        return float((rotary.rotate(q, torch.tensor([i])) * rotary.rotate(k, torch.tensor([j]))).sum())

    assert score(30, 10) == pytest.approx(score(25, 5), abs=1e-5)
    assert score(30, 10) != pytest.approx(score(30, 11), abs=1e-3)


def test_older_configurations_and_unknown_scalings() -> None:
    old = {"hidden_size": 64, "num_attention_heads": 4, "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    assert Rotary.from_model_config(old) == Rotary(head_dim=16, base=1e6, rotary_dim=8)
    with pytest.raises(ProbeError, match="`yarn` is not supported"):
        Rotary.from_model_config({**old, "rope_scaling": {"type": "yarn", "factor": 2.0}})
    with pytest.raises(ValueError, match="even"):
        Rotary(head_dim=16, rotary_dim=3)


def test_frequencies_fall_geometrically() -> None:
    freq = Rotary(head_dim=8, base=10000.0).frequencies()
    assert freq.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])
    stretched = Rotary(head_dim=8, llama3=LLAMA3).frequencies()
    assert stretched[0] == freq[0]
    assert 2 * math.pi / freq[-1] < 8192 / 1.0  # within the band: between the original and the stretched one
    assert freq[-1] / 8 < stretched[-1] < freq[-1]
