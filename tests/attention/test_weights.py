"""Attention weights from queries and keys, against entry-by-entry references."""

from __future__ import annotations

import math

import pytest
import torch

from sglang_probe.attention import weights as attention
from sglang_probe.attention.weights import AttentionSpec, attention_received, attention_weights, visible
from sglang_probe.errors import ProbeError
from tests.eviction.toy import HEADS, prompt_rows, toy


def test_weights_of_grouped_query_heads_are_those_computed_entry_by_entry() -> None:
    layer = toy()
    a = layer.prompt_attention(layer.length)
    assert a.shape == (2, 2, 12, 12)
    for head in range(HEADS):
        expected = torch.tensor(prompt_rows(layer, head), dtype=torch.float64)
        torch.testing.assert_close(a[head // 2, head % 2], expected, rtol=1e-12, atol=1e-15)


def test_the_last_queries_see_what_they_see_among_all_queries() -> None:
    layer = toy()
    torch.testing.assert_close(layer.prompt_attention(3), layer.prompt_attention(12)[..., -3:, :])


def test_a_soft_cap_bounds_the_logits_and_a_sliding_window_hides_old_keys() -> None:
    q, k = torch.tensor([[[3.0]], [[3.0]]]), torch.tensor([[[1.0]], [[2.0]], [[4.0]]])
    a = attention_weights(q, k, AttentionSpec(scaling=2.0, softcap=5.0, sliding_window=2), first=1)
    caps = [5 * math.tanh(2 * 3 * x / 5) for x in (1.0, 2.0, 4.0)]
    e = [math.exp(c) for c in caps]
    expected = [[e[0] / (e[0] + e[1]), e[1] / (e[0] + e[1]), 0.0], [0.0, e[1] / (e[1] + e[2]), e[2] / (e[1] + e[2])]]
    torch.testing.assert_close(a[0, 0], torch.tensor(expected))


def test_correct_lookahead_masks_show_every_prompt_key_to_lookahead_rows() -> None:
    # The released LAQ code shows 49 to 64 keys to these 16 rows.
    spec = AttentionSpec(scaling=1.0)
    window, ahead = visible(8, 64, spec, first=56).sum(-1), visible(8, 64, spec, first=64).sum(-1)
    assert window.tolist() == list(range(57, 65))
    assert ahead.tolist() == [64] * 8


def test_received_attention_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = toy()
    whole = attention_received(layer.q_NHD, layer.k_LGD, layer.spec, first=0)
    monkeypatch.setattr(attention, "_BLOCK_ELEMENTS", 5 * HEADS * layer.length)
    assert len(list(attention.attention_blocks(layer.q_NHD, layer.k_LGD, layer.spec, first=0))) == 3
    torch.testing.assert_close(attention_received(layer.q_NHD, layer.k_LGD, layer.spec, first=0), whole)


def test_bf16_rows_are_scored_in_float32() -> None:
    layer = toy()
    a = attention_weights(layer.q_NHD.bfloat16(), layer.k_LGD.bfloat16(), layer.spec, first=0)
    assert a.dtype == torch.float32


def test_a_query_without_a_key_and_an_uneven_group_are_refused() -> None:
    q, k = torch.zeros(1, 3, 2), torch.zeros(4, 2, 2)
    with pytest.raises(ProbeError, match="3 query heads"):
        attention_weights(q, k, AttentionSpec(scaling=1.0), first=3)
    with pytest.raises(ProbeError, match="sees no key"):
        attention_weights(q[:, :2], k, AttentionSpec(scaling=1.0, sliding_window=2), first=9)
