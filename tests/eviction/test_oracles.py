"""Oracles against exhaustive search, and the two protocols."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from sglang_probe.errors import ProbeError
from sglang_probe.eviction import METHODS, Protocol, Queries, parse_method, parse_oracle, under
from sglang_probe.eviction.metrics import nontrivial_mass_recall, prompt_mass_recall, trivial_mask
from tests.eviction.test_selection import small
from tests.eviction.toy import HEADS, KV_HEADS, LENGTH, STEPS, behind_rows, prompt_rows, toy


def test_future_attention_runs_over_prompt_and_generated_keys() -> None:
    layer = toy()
    a = layer.future_attention
    assert a.shape == (KV_HEADS, 2, STEPS, LENGTH + STEPS)
    assert layer.future is not None
    for h in range(HEADS):
        expected = behind_rows(layer, layer.future, h, own_keys=True)
        torch.testing.assert_close(a[h // 2, h % 2, :, :LENGTH], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(a.sum(-1), torch.ones(a.shape[:-1], dtype=torch.float64))


def test_static_mean_holds_the_most_pooled_mass_of_all_subsets_with_the_same_protected_set() -> None:
    layer = toy()
    oracle = parse_oracle({"oracle": "static_mean", "sinks": 1, "recent": 1})
    trivial = trivial_mask(LENGTH, sinks=1, window=1)
    recall = nontrivial_mass_recall(layer.future_attention, oracle.select(layer, 5).keep_TGL, trivial).pooled(-1, -2)
    for chosen in combinations(range(1, LENGTH - 1), 3):
        keep = trivial.clone()
        keep[list(chosen)] = True
        other = nontrivial_mass_recall(layer.future_attention, keep.expand(1, KV_HEADS, LENGTH), trivial)
        assert (other.pooled(-1, -2) <= recall + 1e-12).all()


def test_static_max_keeps_a_token_that_one_step_reads_and_static_mean_drops() -> None:
    """One step puts 0.6 on position 3; ten steps put 0.1 on position 5."""
    logits = torch.full((10, 8), -2.0, dtype=torch.float64)
    logits[:, 5] = 0.5
    logits[4, 3] = 4.0
    # A query that selects column t of the keys has exactly these logits.
    layer = toy(
        length=8,
        q_NHD=torch.zeros(8, 1, 10, dtype=torch.float64),
        k_LGD=2 * logits.T[:, None, :],
        v_LGD=None,
        w_o_HDM=None,
        lookahead={},
        future=Queries(
            torch.eye(10, dtype=torch.float64)[:, None], torch.full((10, 1, 10), -20.0, dtype=torch.float64)
        ),
        needed_L=None,
        rotary=None,
    )
    best_mean, best_max = (
        parse_oracle(o).select(layer, 1).keep_GL[0].nonzero().item() for o in ("static_mean", "static_max")
    )
    assert (best_mean, best_max) == (5, 3)


def test_static_max_weighted_by_the_projected_value_differs_from_the_plain_one() -> None:
    plain = parse_oracle("static_max").scores(toy())
    weighted = parse_oracle({"oracle": "static_max", "weight": "projected_value"}).scores(toy())
    assert not torch.allclose(plain / plain.sum(), weighted / weighted.sum())
    norms = (toy().v_LGD[:, 1] @ toy().w_o_HDM[2]).abs().sum(-1), (toy().v_LGD[:, 1] @ toy().w_o_HDM[3]).abs().sum(-1)  # type: ignore[index]
    a = toy().future_attention[1, :, :, :LENGTH].amax(-2)
    torch.testing.assert_close(weighted[1], torch.maximum(a[0] * norms[0], a[1] * norms[1]))


@pytest.mark.parametrize("name", [*METHODS, "static_mean", "static_max", "causal_refreshed", "need_set"])
def test_no_policy_of_the_same_size_holds_more_mass_in_a_step_than_the_per_step_oracle(name: str) -> None:
    layer = toy(3)
    keep = small(name).select(layer, 6).keep_TGL
    bound = parse_oracle("per_step").select(layer, 6).keep_TGL
    group = [prompt_mass_recall(layer.future_attention, k).numerator.sum(-2) for k in (keep, bound)]
    # Pyramid and Ada move budget between layers and heads; compare where they kept no more than the bound.
    fair = keep.sum(-1).movedim(-1, -2) <= 6
    assert (group[0] <= group[1] + 1e-12)[fair.expand(group[0].shape)].all()


def test_causal_refreshed_scores_with_the_last_queries_before_each_refresh() -> None:
    layer = toy()
    oracle = parse_oracle({"oracle": "causal_refreshed", "window": 3, "refresh": 2, "pooling": "none"})
    scores = oracle.scores(layer)
    assert layer.future is not None
    for h0 in range(KV_HEADS):
        rows = [
            prompt_rows(layer, h)[-3:] + behind_rows(layer, layer.future, h, own_keys=False)
            for h in (2 * h0, 2 * h0 + 1)
        ]
        for t, first in enumerate((0, 0, 2, 2, 4)):
            expected = [sum(r[i][j] for r in rows for i in range(first, first + 3)) / 2 for j in range(LENGTH)]
            torch.testing.assert_close(scores[t, h0], torch.tensor(expected, dtype=torch.float64))


def test_causal_refreshed_never_uses_a_later_query() -> None:
    layer = toy()
    assert layer.future is not None
    changed = layer.future.q_THD.clone()
    changed[2:] = 9.0
    oracle = parse_oracle({"oracle": "causal_refreshed", "window": 3, "refresh": 2})
    a, b = oracle.scores(layer), oracle.scores(replace(layer, future=replace(layer.future, q_THD=changed)))
    assert torch.equal(a[:4], b[:4])
    assert not torch.equal(a[4], b[4])


def test_the_need_set_comes_first_and_the_newest_fill_the_budget() -> None:
    keep = parse_oracle("need_set").select(toy(), 5).keep_GL  # needed: 2, 7
    assert keep[0].nonzero().flatten().tolist() == [2, 7, 9, 10, 11]


def test_the_hidden_protocol_takes_the_question_out_of_the_prompt() -> None:
    layer = toy()
    hidden = under(Protocol.QUERY_HIDDEN, layer, context=9)
    assert hidden.length == 9
    assert not hidden.lookahead
    # The same attention, cut elsewhere: the last context query, and the decode rows over all keys.
    torch.testing.assert_close(hidden.prompt_attention(2), layer.prompt_attention(5)[..., :2, :9])
    assert hidden.future is not None
    assert hidden.future.skip == 2
    question = layer.prompt_attention(1)
    torch.testing.assert_close(hidden.future_attention[..., :1, :12], question)
    torch.testing.assert_close(hidden.future_attention[..., 1:, :], layer.future_attention)
    assert under(Protocol.QUERY_VISIBLE, layer, context=9) is layer


def test_a_window_method_does_not_see_a_hidden_question() -> None:
    layer = toy()
    other = replace(layer, q_NHD=torch.cat([layer.q_NHD[:9], toy(1).q_NHD[9:]]))
    method = parse_method({"method": "snapkv", "window": 3, "kernel": 3})
    hidden = [method.scores(under(Protocol.QUERY_HIDDEN, x, context=9)) for x in (layer, other)]
    shown = [method.scores(x) for x in (layer, other)]
    assert torch.equal(hidden[0], hidden[1])
    assert not torch.equal(shown[0], shown[1])


def test_a_question_that_was_not_captured_or_fills_the_prompt_is_refused() -> None:
    with pytest.raises(ProbeError, match="the question alone has 3"):
        under(Protocol.QUERY_HIDDEN, replace(toy(), q_NHD=toy().q_NHD[-3:]), context=9)
    with pytest.raises(ProbeError, match="leaves no question"):
        under(Protocol.QUERY_HIDDEN, toy(), context=12)
