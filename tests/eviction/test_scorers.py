"""Scores of every method against loops over single entries, on a layer of 12 positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sglang_probe.attention.weights import AttentionSpec
from sglang_probe.errors import ProbeError
from sglang_probe.eviction import Layer, parse_method
from tests.eviction.toy import DIM, HEADS, KV_HEADS, LENGTH, WIDTH, behind_rows, prompt_rows, toy

Rows = Callable[[Layer, int], list[list[float]]]


def close(ours: Tensor, expected: Sequence[Sequence[float]], tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=ours.dtype), rtol=tolerance, atol=tolerance)


def column_sums(rows: list[list[float]]) -> list[float]:
    return [sum(r[j] for r in rows) for j in range(len(rows[0]))]


def pooled(x: list[float], kind: str, kernel: int, cut: int) -> list[float]:
    """Pool positions below `cut` among themselves and leave the rest."""
    half = kernel // 2
    out = []
    for j in range(cut):
        near = x[max(0, j - half) : min(cut, j + half + 1)]
        out.append(max(near) if kind == "max" else sum(near) / kernel if kind == "avg" else x[j])
    return out + x[cut:]


def grouped(per_head: list[list[float]], how: str) -> list[list[float]]:
    """Reduce heads (0, 1) and (2, 3)."""
    f = {"mean": lambda v: sum(v) / len(v), "max": max, "sum": sum}[how]
    return [[f([per_head[h][j] for h in (2 * g, 2 * g + 1)]) for j in range(LENGTH)] for g in range(KV_HEADS)]


@pytest.mark.parametrize("pooling", ["none", "avg", "max"])
@pytest.mark.parametrize("gqa", ["mean", "max", "sum"])
@pytest.mark.parametrize("order", ["pool_then_group", "group_then_pool"])
def test_snapkv_sums_the_window_then_pools_and_reduces_in_the_stated_order(pooling: str, gqa: str, order: str) -> None:
    layer = toy()
    config = {"method": "snapkv", "window": 3, "pooling": pooling, "kernel": 3, "gqa": gqa, "order": order}
    heads = [column_sums(prompt_rows(layer, h)[-3:]) for h in range(HEADS)]
    if order == "pool_then_group":
        expected = grouped([pooled(x, pooling, 3, LENGTH - 3) for x in heads], gqa)
    else:
        expected = [pooled(x, pooling, 3, LENGTH - 3) for x in grouped(heads, gqa)]
    close(parse_method(config).scores(layer), expected)


def test_snapkv_mean_over_the_window_is_the_sum_divided_by_it() -> None:
    by_sum, by_mean = (parse_method({"method": "snapkv", "window": 3, "rows": r}) for r in ("sum", "mean"))
    torch.testing.assert_close(by_mean.scores(toy()) * 3, by_sum.scores(toy()))


def test_pyramidkv_scores_are_those_of_snapkv() -> None:
    config = {"window": 3, "kernel": 3}
    snap, pyramid = (parse_method({"method": m, **config}).scores(toy()) for m in ("snapkv", "pyramidkv"))
    assert torch.equal(snap, pyramid)


def test_tova_averages_the_last_row_over_all_heads_of_the_layer() -> None:
    layer = toy()
    last = [prompt_rows(layer, h)[-1] for h in range(HEADS)]
    mean = [sum(r[j] for r in last) / HEADS for j in range(LENGTH)]
    close(parse_method("tova").scores(layer), [mean, mean])


def test_observed_attention_divides_by_the_number_of_queries_that_see_the_key() -> None:
    layer = toy()
    heads = [[s / (LENGTH - j) for j, s in enumerate(column_sums(prompt_rows(layer, h)))] for h in range(HEADS)]
    close(parse_method("observed_attention").scores(layer), grouped(heads, "mean"))


def test_observed_attention_counts_only_queries_whose_sliding_window_holds_the_key() -> None:
    layer = toy(q_NHD=torch.zeros(LENGTH, HEADS, DIM), spec=AttentionSpec(scaling=1.0, sliding_window=3))
    # Uniform attention over min(i + 1, 3) keys: from position 2 on each query gives 1/3.
    scores = parse_method("observed_attention").scores(layer)[0]
    assert scores[4].item() == pytest.approx(1 / 3)
    assert scores[0].item() == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert scores[-1].item() == pytest.approx(1 / 3)


def test_h2o_once_is_the_causal_column_sum() -> None:
    layer = toy()
    heads = [column_sums(prompt_rows(layer, h)) for h in range(HEADS)]
    close(parse_method({"method": "h2o", "eviction": "once"}).scores(layer), grouped(heads, "mean"))


def test_knorm_prefers_small_keys_and_keydiff_keys_off_the_mean_direction() -> None:
    layer = toy()
    k = [[[float(x) for x in layer.k_LGD[j, g]] for j in range(LENGTH)] for g in range(KV_HEADS)]
    norm = [[math.sqrt(sum(x * x for x in row)) for row in head] for head in k]
    close(parse_method("knorm").scores(layer), [[-n for n in head] for head in norm])
    expected = []
    for head, norms in zip(k, norm, strict=True):
        units = [[x / n for x in row] for row, n in zip(head, norms, strict=True)]
        mean = [sum(u[d] for u in units) / LENGTH for d in range(DIM)]
        length = math.sqrt(sum(x * x for x in mean))
        expected.append([-sum(a * b for a, b in zip(u, mean, strict=True)) / length for u in units])
    close(parse_method("keydiff").scores(layer), expected)


@pytest.mark.parametrize(
    ("name", "window", "own_keys", "pooling", "gqa"),
    [
        ("laq", 0, False, "max", "mean"),
        ("laq++", 8, False, "max", "mean"),
        ("dapq", 0, True, "none", "mean"),
        ("speckv", 4, True, "max", "max"),
    ],
)
def test_lookahead_scorers_sum_lookahead_and_window_rows_under_their_own_masks(
    name: str, window: int, own_keys: bool, pooling: str, gqa: str
) -> None:
    layer = toy()
    method = parse_method({"method": name, "window": window, "recent": 2, "kernel": 3})
    # Without a word about it, each uses its published window, pooling, softmax and reduction.
    defaults = parse_method(name).parameters()
    assert (defaults["pooling"], defaults["gqa"]) == (pooling, gqa)
    assert defaults["softmax"] == ("visible" if own_keys else "prompt")
    published = {"laq": (8, 0, 32), "laq++": (8, 8, 32), "dapq": (32, 0, 0), "speckv": (32, 32, 32)}
    assert (defaults["steps"], defaults["window"], defaults["recent"]) == published[name]
    heads = []
    for h in range(HEADS):
        rows = behind_rows(layer, layer.lookahead[method.parameters()["queries"]], h, own_keys=own_keys)
        rows += prompt_rows(layer, h)[LENGTH - window :]
        heads.append(pooled(column_sums(rows), pooling, 3, LENGTH - 2))
    close(method.scores(layer), grouped(heads, gqa))


def test_lookahead_uses_at_most_the_asked_steps_and_fewer_after_an_early_end() -> None:
    layer = toy()
    one = parse_method({"method": "laq", "steps": 1, "pooling": "none"})
    close(
        one.scores(layer),
        grouped([behind_rows(layer, layer.lookahead["laq"], h, own_keys=False)[0] for h in range(HEADS)], "mean"),
    )
    assert torch.equal(parse_method({"method": "laq", "steps": 3}).scores(layer), parse_method("laq").scores(layer))


def test_lookahead_queries_that_are_missing_are_named() -> None:
    layer = toy(lookahead={})
    with pytest.raises(ProbeError, match="`laq` are needed; there are none"):
        parse_method("laq").scores(layer)


def test_expected_attention_is_the_gaussian_mean_of_the_exponential() -> None:
    """With few future positions the closed form is compared with explicit rotation matrices, entry by entry."""
    layer = toy(length=9)
    method = parse_method({"method": "expected_attention", "sinks": 2, "future_positions": 3, "epsilon": 0.01})
    assert layer.rotary is not None
    pre = layer.rotary.unrotate(layer.q_NHD, torch.arange(9))
    freq = layer.rotary.frequencies().double()
    turn = torch.zeros(DIM, DIM, dtype=torch.float64)
    for p in (9, 10, 11):
        for i, f in enumerate(freq):
            c, s = math.cos(p * f), math.sin(p * f)
            turn[i, i] += c / 3
            turn[i + 2, i + 2] += c / 3
            turn[i, i + 2] -= s / 3
            turn[i + 2, i] += s / 3
    expected = []
    for g in range(KV_HEADS):
        shares = []
        for h in (2 * g, 2 * g + 1):
            q = pre[2:, h]
            mean = q.mean(0)
            cov = sum((torch.outer(x - mean, x - mean) for x in q), torch.zeros(DIM, DIM, dtype=torch.float64)) / len(q)
            mean, cov = turn @ mean, turn @ cov @ turn.T
            k = layer.k_LGD[2:, g]
            shares.append(torch.softmax(0.5 * k @ mean + 0.125 * ((k @ cov) * k).sum(-1), 0))
        v = layer.v_LGD[2:, g].norm(dim=-1)  # type: ignore[index]
        expected.append([0.0, 0.0, *((sum(shares) / 2 + 0.01) * v).tolist()])  # type: ignore[union-attr]
    close(method.scores(layer), expected, tolerance=1e-6)


def test_expected_attention_takes_pre_rope_queries_where_they_were_captured() -> None:
    layer = toy()
    assert layer.rotary is not None
    captured = layer.rotary.unrotate(layer.q_NHD, torch.arange(LENGTH))
    method = parse_method("expected_attention")
    assert torch.equal(method.scores(toy(q_pre_NHD=captured)), method.scores(layer))
    assert not torch.equal(method.scores(toy(q_pre_NHD=layer.q_NHD)), method.scores(layer))
    with pytest.raises(ProbeError, match="soft cap"):
        method.scores(toy(spec=AttentionSpec(scaling=0.5, softcap=30.0)))


def test_protected_lru_scores_the_last_prompt_query_that_used_a_position() -> None:
    layer = toy()
    expected = []
    for g in range(KV_HEADS):
        rows = [prompt_rows(layer, h) for h in (2 * g, 2 * g + 1)]
        last = []
        for j in range(LENGTH):
            uses = [i for i in range(LENGTH) if max(r[i][j] for r in rows) > 1 / (i + 1)]
            last.append(float(max([j, *uses])))
        expected.append(last)
    close(parse_method("protected_lru").scores(layer), expected)
    assert expected[0] != [float(j) for j in range(LENGTH)]
    # Only the last queries count, and positions that none of them used keep their own index.
    late = parse_method({"method": "protected_lru", "queries": 4}).scores(layer)
    close(late, [[x if x >= LENGTH - 4 else float(j) for j, x in enumerate(row)] for row in expected])


def test_criticalkv_multiplies_by_the_projected_value_in_l1() -> None:
    layer = toy()
    base = {"method": "snapkv", "window": 3, "rows": "mean", "pooling": "none"}
    scores = parse_method(base).scores(layer)
    expected = []
    for g in range(KV_HEADS):
        row = []
        for j in range(LENGTH):
            norms = []
            for h in (2 * g, 2 * g + 1):
                v, w = layer.v_LGD[j, g], layer.w_o_HDM[h]  # type: ignore[index]
                norms.append(sum(abs(sum(float(v[d] * w[d, m]) for d in range(DIM))) for m in range(WIDTH)))
            row.append((float(scores[g, j]) + 1e-4) * sum(norms) / 2)
        expected.append(row)
    close(parse_method({"method": "criticalkv", "base": base}).scores(layer), expected)


def test_caote_around_one_query_is_the_exact_change_of_the_output() -> None:
    """TOVA with one head: removing j and renormalising moves the output by exactly the score."""
    full = toy()
    layer = toy(q_NHD=full.q_NHD[:, :1], k_LGD=full.k_LGD[:, :1], v_LGD=full.v_LGD[:, :1], lookahead={}, future=None)  # type: ignore[index]
    a = torch.tensor(prompt_rows(layer, 0)[-1], dtype=torch.float64)
    v = layer.v_LGD[:, 0]  # type: ignore[index]
    expected = []
    for j in range(LENGTH):
        rest = a.clone()
        rest[j] = 0
        expected.append(float((a @ v - rest @ v / rest.sum()).norm()))
    close(parse_method({"method": "caote", "base": "tova"}).scores(layer), [expected])


def test_fast_caote_uses_the_plain_mean_and_scores_that_are_no_weights_are_refused() -> None:
    layer = toy()
    a = parse_method("snapkv").scores(layer)
    a = a / a.sum(-1, keepdim=True)
    v = layer.v_LGD.movedim(0, 1)  # type: ignore[union-attr]
    expected = a / (1 - a) * (v.mean(1, keepdim=True) - v).norm(dim=-1)
    torch.testing.assert_close(parse_method({"method": "caote", "output": "mean"}).scores(layer), expected)
    with pytest.raises(ProbeError, match="`keydiff` gives negative"):
        parse_method({"method": "caote", "base": "keydiff"}).scores(layer)


def test_quest_scores_are_upper_bounds_of_every_logit_in_the_page() -> None:
    layer = toy()
    scores = parse_method({"method": "quest", "page": 5}).scores(layer)
    assert scores.shape == (5, KV_HEADS, LENGTH)
    future = layer.future
    assert future is not None
    for t in range(5):
        for g in range(KV_HEADS):
            for start, end in ((0, 5), (5, 10), (10, 12)):
                page = layer.k_LGD[start:end, g]
                bounds = [
                    sum(max(float(q * page[:, d].min()), float(q * page[:, d].max())) for d, q in enumerate(row))
                    for row in (future.q_THD[t, h] for h in (2 * g, 2 * g + 1))
                ]
                assert scores[t, g, start].item() == pytest.approx(max(bounds))
                assert (scores[t, g, start:end] == scores[t, g, start]).all()
                logits = (page @ future.q_THD[t, 2 * g : 2 * g + 2].T).amax()
                assert scores[t, g, start] >= logits


def test_random_scores_depend_on_request_layer_and_seed_and_look_uniform() -> None:
    def draw(seed: int, **replaced: int) -> Tensor:
        layer = toy(length=2000, **{k: torch.tensor(v) for k, v in replaced.items()})
        return parse_method({"method": "random", "seed": seed}).scores(layer)

    base = draw(0, request=1, index=2)
    assert torch.equal(base, draw(0, request=1, index=2))
    for seed, request, index in ((1, 1, 2), (0, 1, 3), (0, 2, 2), (0, 2, 1)):
        other = draw(seed, request=request, index=index)
        assert abs(torch.corrcoef(torch.stack([base[0], other[0]]))[0, 1]) < 0.1
    assert abs(torch.corrcoef(base)[0, 1]) < 0.1
    assert base.mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.histc(base, 10, 0, 1).min() > 300
