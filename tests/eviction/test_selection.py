"""What methods keep: invariants of all of them, allocation of budgets, and the stepwise algorithms by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sglang_probe.attention.weights import AttentionSpec
from sglang_probe.errors import ConfigError, ProbeError
from sglang_probe.eviction import METHODS, ORACLES, Layer, Policy, Queries, parse_method, parse_oracle, stack
from sglang_probe.eviction.methods.pyramidkv import pyramid
from tests.eviction.toy import DIM, HEADS, KV_HEADS, LENGTH, SPEC, STEPS, toy

# Small windows, so that every method has something to choose in a prompt of 12.
SMALL = {
    "protected_random": {"sinks": 1, "recent": 2},
    "streaming_llm": {"sinks": 1},
    "protected_lru": {"sinks": 1, "recent": 2},
    "snapkv": {"window": 3, "kernel": 3},
    "pyramidkv": {"window": 3, "kernel": 3, "beta": 3},
    "expected_attention": {"sinks": 1},
    "laq": {"recent": 2, "kernel": 3},
    "laq++": {"window": 2, "recent": 2, "kernel": 3},
    "speckv": {"window": 3, "kernel": 3},
    "adakv": {"base": {"method": "snapkv", "window": 3}},
    "criticalkv": {"base": {"method": "snapkv", "window": 3}},
    "caote": {"base": {"method": "snapkv", "window": 3}},
    "quest": {"page": 2, "min_pages": 1, "dense_layers": 0},
    "causal_refreshed": {"window": 3, "refresh": 2, "kernel": 3},
}
NAMES = [*METHODS, *ORACLES]


def small(name: str) -> Policy:
    config = SMALL.get(name, {})
    return parse_method({"method": name, **config}) if name in METHODS else parse_oracle({"oracle": name, **config})


def all_layers() -> list[Layer]:
    return [toy(seed, index=torch.tensor(seed), request=torch.tensor(7)) for seed in range(4)]


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_of_the_whole_prompt_keeps_everything(name: str) -> None:
    for budget in (LENGTH, LENGTH + 5):
        assert small(name).select(toy(), budget).keep_TGL.all()


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_keeps_its_budget_and_the_protected_positions(name: str) -> None:
    layer = stack(all_layers())
    method = small(name)
    selection = method.select(layer, 6)
    steps = 1 if selection.evicts else STEPS
    assert selection.keep_TGL.shape == (4, steps, KV_HEADS, LENGTH)
    assert selection.scores_TGL.shape == selection.keep_TGL.shape
    # Six positions per head on average over the layers, whoever allocates.
    assert selection.keep_TGL.sum() == 4 * steps * KV_HEADS * 6
    protected = method.protected(layer, 6).expand(layer.shape_GL)
    if name != "quest":
        assert torch.equal(selection.keep_TGL.sum(-1), method.budgets(layer, 6)[:, None].expand(4, steps, KV_HEADS))
    assert selection.keep_TGL[protected[:, None].expand(selection.keep_TGL.shape)].all()


@pytest.mark.parametrize("name", NAMES)
def test_under_one_protection_every_policy_keeps_the_same_ends_and_its_exact_budget(name: str) -> None:
    layer = stack(all_layers())
    method = small(name).protecting(2, 2)
    keep = method.select(layer, 6).keep_TGL
    assert keep[..., :2].all()
    assert keep[..., -2:].all()
    assert keep.sum() == 6 * keep[..., 0].numel()
    if name not in ("h2o", "quest"):  # half of H2O's budget is the most recent, and Quest's pages are of two
        assert method.protected(layer, 6).expand(layer.shape_GL).sum(-1).unique().tolist() == [4]
    shown = method.parameters().get("base", method.parameters())
    assert (shown["sinks"], shown["recent"]) == (2, 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_of_layers_gives_what_each_layer_gives_alone(name: str) -> None:
    together = small(name).select(stack([stack(all_layers()[:2]), stack(all_layers()[2:])]), 6)
    for i, layer in enumerate(all_layers()):
        alone = small(name).select(layer, 6)
        assert torch.equal(together.keep_TGL[i // 2, i % 2], alone.keep_TGL)
        torch.testing.assert_close(together.scores_TGL[i // 2, i % 2], alone.scores_TGL)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("random", "protected_random", "streaming_llm")])
def test_queries_and_keys_of_another_request_change_what_is_kept(name: str) -> None:
    one, other = toy(0, length=64), toy(1, length=64)
    mixed = replace(one, q_NHD=other.q_NHD, k_LGD=other.k_LGD, lookahead=other.lookahead, future=other.future)
    a, b = (small(name).select(x, 16).keep_TGL for x in (one, mixed))
    assert (a & b).sum() < 0.95 * a.sum()


@pytest.mark.parametrize("name", ["laq", "dapq", "speckv"])
def test_lookahead_queries_of_another_request_change_what_is_kept(name: str) -> None:
    one, other = toy(0, length=64), toy(1, length=64)
    a, b = (small(name).select(x, 16).keep_TGL for x in (one, replace(one, lookahead=other.lookahead)))
    assert (a & b).sum() < a.sum()


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].model_fields.get("gqa")])
def test_per_query_head_layers_are_scored_head_by_head(name: str) -> None:
    wide = small(name).select(toy().per_query_head(), 6)
    assert wide.keep_TGL.shape[-2:] == (HEADS, LENGTH)
    if name in ("snapkv", "h2o", "laq"):  # heads 0 and 1 share keys and differ in queries
        assert not torch.equal(wide.keep_GL[0], wide.keep_GL[1])


def test_describe_prints_every_parameter_with_its_value() -> None:
    for name in METHODS:
        method = small(name)
        text = method.describe()
        fields = set(METHODS[name].model_fields) - (
            {"sinks", "recent"} if "base" in METHODS[name].model_fields else set()
        )
        assert text.startswith(f"{name}(")
        assert all(f"{f}=" in text for f in fields), text
        assert method.source
    assert "base=snapkv(" in small("adakv").describe()
    assert "window=3" in small("adakv").describe()
    again = small("criticalkv")
    assert parse_method({"method": "criticalkv", **again.parameters()}) == again


def test_no_oracle_is_a_method() -> None:
    assert not set(METHODS) & set(ORACLES)
    assert all(o.leaks for o in ORACLES.values())
    assert not any(m.leaks for m in METHODS.values())
    with pytest.raises(ConfigError, match="no method `static_mean`"):
        parse_method("static_mean")


def test_unknown_methods_and_parameters_are_named_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match="did you mean `snapkv`"):
        parse_method("snapvk")
    with pytest.raises(ConfigError, match="did you mean `window`"):
        parse_method({"method": "snapkv", "windo": 3})
    with pytest.raises(ConfigError, match="belong to the wrapped method"):
        parse_method({"method": "adakv", "sinks": 3})
    with pytest.raises(ConfigError, match="no method `snapvk`"):
        parse_method({"method": "adakv", "base": "snapvk"})


def test_the_always_kept_set_follows_the_window_unless_given() -> None:
    assert parse_method({"method": "snapkv", "window": 8}).recent == 8
    assert parse_method({"method": "snapkv", "window": 8, "recent": 1}).recent == 1
    assert parse_method({"method": "speckv", "window": 8}).recent == 8


def test_streaming_llm_keeps_sinks_and_the_newest() -> None:
    keep = parse_method("streaming_llm").select(toy(), 6).keep_GL
    assert keep[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 10, 11]
    assert torch.equal(keep[0], keep[1])


def test_a_missing_capture_is_named() -> None:
    short = replace(toy(), q_NHD=toy().q_NHD[-3:])
    with pytest.raises(ProbeError, match="12 prompt queries are needed and 3 of 12 were captured"):
        parse_method("h2o").select(short, 6)
    assert parse_method({"method": "snapkv", "window": 3}).select(short, 6).keep_GL.sum() == 12
    with pytest.raises(ProbeError, match="`w_o_HDM` is needed"):
        small("criticalkv").select(replace(toy(), w_o_HDM=None), 6)


def test_layers_that_differ_are_not_stacked() -> None:
    with pytest.raises(ProbeError, match="differ in `spec`"):
        stack([toy(), toy(spec=AttentionSpec(scaling=0.5, sliding_window=4))])
    with pytest.raises(ProbeError, match="cannot be stacked"):
        stack([toy(), toy(length=13)])
    with pytest.raises(ProbeError, match="cannot be stacked"):
        stack([toy(), replace(toy(), needed_L=None)])


# H2O ------------------------------------------------------------------------------------------------------------------


def test_greedy_h2o_by_hand_with_uniform_attention() -> None:
    """Budget 2 of 4, one recent. Sums after two rows: 1.5, 0.5. Row 2 adds 1/3 each, position 1 goes; row 3 adds 1/3 to
    positions 0, 2, 3, and 2 goes."""
    layer = Layer(q_NHD=torch.zeros(4, 1, 1), k_LGD=torch.zeros(4, 1, 1), spec=AttentionSpec(scaling=1.0))
    selection = parse_method("h2o").select(layer, 2)
    assert selection.keep_GL.tolist() == [[True, False, False, True]]
    assert selection.scores_GL[0, [0, 3]].tolist() == pytest.approx([1.5 + 2 / 3, 1 / 3])


def test_greedy_h2o_is_the_algorithm_written_out() -> None:
    layer = toy(length=24)
    budget, recent = 7, 4
    logits = torch.einsum("ihd,jhd->hij", layer.q_NHD, layer.k_LGD.repeat_interleave(2, 1)) * 0.5
    for g in range(KV_HEADS):
        kept: list[int] = []
        total = dict.fromkeys(range(24), 0.0)
        for i in range(24):
            kept.append(i)
            for h in (2 * g, 2 * g + 1):
                for j, w in zip(kept, torch.softmax(logits[h, i, kept], 0).tolist(), strict=True):
                    total[j] += w / 2
            if len(kept) > budget:
                kept.remove(min((j for j in kept if j <= i - recent), key=lambda j: total[j]))
        selection = parse_method("h2o").select(layer, budget)
        assert selection.keep_GL[g].nonzero().flatten().tolist() == kept
    once = parse_method({"method": "h2o", "eviction": "once"}).select(layer, budget)
    assert not torch.equal(once.keep_GL, selection.keep_GL)


# Budgets by layer and head --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "most", "layers", "beta", "expected"),
    [
        (10, 100, 3, 2, [15, 10, 5]),
        (10, 100, 4, 20, [20, 13, 7, 0]),  # 19.5, 13.17, 6.83, 0.5
        (10, 12, 3, 20, [12, 10, 8]),  # cut to the prompt, the last layer raised to match
        (10, 10, 3, 20, [10, 10, 10]),
        (7, 100, 1, 20, [7]),
        (0, 5, 3, 2, [0, 0, 0]),
    ],
)
def test_pyramid_budgets_fall_linearly_and_keep_their_mean(
    mean: int, most: int, layers: int, beta: int, expected: list[int]
) -> None:
    assert pyramid(mean, most, layers, beta) == expected
    assert sum(expected) == mean * layers


def test_pyramid_totals_are_exact_for_all_small_cases() -> None:
    for mean in range(12):
        for layers in range(1, 8):
            for beta in (1, 2, 7, 20):
                for most in (mean, mean + 1, 3 * mean + 1):
                    line = pyramid(mean, most, layers, beta)
                    assert sum(line) == mean * layers
                    assert min(line) >= 0
                    assert max(line) <= max(most, mean)


def test_adakv_gives_heads_their_share_of_the_layer_by_hand() -> None:
    """Head 0 holds the 5 highest scores of the layer, head 1 the next. Budget 3 per head, nothing protected."""
    k = torch.tensor([[[10.0 - j], [5.0 - j]] for j in range(6)])
    # Knorm scores minus the norm; keys are turned so that head 0 scores -(10 - j) … as given by their norms.
    layer = Layer(q_NHD=torch.zeros(6, 2, 1), k_LGD=k, spec=SPEC)
    scores = parse_method("knorm").scores(layer)
    # head 0: -10 -9 -8 -7 -6 -5; head 1: -5 -4 -3 -2 -1 0 (0 is position 5). Top 6 of the layer are all of head 1
    # (position 5 of head 0 ties with position 0 of head 1, and head 0 comes first): head 0 wins 1, head 1 wins 5.
    assert scores.tolist() == [[-10, -9, -8, -7, -6, -5], [-5, -4, -3, -2, -1, 0]]
    for alpha, expected in ((0.0, [1, 5]), (1.0, [3, 3]), (0.5, [2, 4])):
        method = parse_method({"method": "adakv", "base": "knorm", "alpha": alpha})
        assert method.budgets(layer, 3).tolist() == expected
        assert method.select(layer, 3).keep_GL.sum(-1).tolist() == expected
    floor = parse_method({"method": "adakv", "base": "knorm", "alpha": 0.7, "safeguard": "floor"})
    assert floor.budgets(layer, 3).tolist() == [2, 4]  # at least floor(0.7 · 3) = 2 each


@pytest.mark.parametrize("safeguard", ["mix", "floor"])
def test_adakv_composes_with_pyramidkv_and_keeps_every_layers_total(safeguard: str) -> None:
    layer = stack(all_layers())
    base = {"method": "pyramidkv", "window": 2, "beta": 4}
    ada = parse_method({"method": "adakv", "base": base, "safeguard": safeguard})
    uniform, mixed = parse_method(base).budgets(layer, 6), ada.budgets(layer, 6)
    assert torch.equal(mixed.sum(-1), uniform.sum(-1))
    assert uniform[0, 0] > uniform[-1, 0]
    assert not torch.equal(mixed, uniform)
    assert torch.equal(ada.select(layer, 6).keep_GL.sum(-1), mixed)


def test_criticalkv_keeps_the_first_stage_by_base_score_alone() -> None:
    layer = toy(length=32)
    base = {"method": "snapkv", "window": 2, "kernel": 1}
    critical = parse_method({"method": "criticalkv", "base": base})
    keep = critical.select(layer, 12).keep_GL
    first = parse_method(base).select(layer, 6).keep_GL
    assert (keep | ~first).all()
    assert torch.equal(
        parse_method({"method": "criticalkv", "base": base, "first_stage": 1.0}).select(layer, 12).keep_GL,
        parse_method(base).select(layer, 12).keep_GL,
    )
    assert not torch.equal(keep, parse_method(base).select(layer, 12).keep_GL)


def test_quest_keeps_whole_pages_at_least_the_minimum_and_all_in_dense_layers() -> None:
    layer = toy(index=torch.tensor(1))
    pages = {"method": "quest", "page": 4, "dense_layers": 1}
    keep = parse_method({**pages, "min_pages": 1}).select(layer, 9).keep_TGL
    assert (keep.unflatten(-1, (3, 4)).all(-1) == keep.unflatten(-1, (3, 4)).any(-1)).all()
    assert (keep.sum(-1) == 8).all()
    assert not (keep == keep[:1]).all()  # chosen anew for each decode query
    assert (parse_method({**pages, "min_pages": 2}).select(layer, 4).keep_TGL.sum(-1) == 8).all()
    assert parse_method({**pages, "dense_layers": 2}).select(layer, 4).keep_TGL.all()


def test_a_prompt_shorter_than_the_window_is_kept_or_refused() -> None:
    method = parse_method("snapkv")
    assert method.select(toy(), LENGTH).keep_GL.all()
    with pytest.raises(ProbeError, match="does not hold the 12 protected"):
        method.select(toy(), 6)


def test_queries_of_a_prompt_longer_than_its_keys_are_refused() -> None:
    with pytest.raises(ProbeError, match="13 prompt queries for 12"):
        replace(toy(), q_NHD=torch.zeros(13, HEADS, DIM))
    assert Queries(torch.zeros(1, HEADS, DIM)).skip == 0
