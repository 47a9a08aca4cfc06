"""Every metric against a plain reference, every chance level against full enumeration."""

from __future__ import annotations

import math
from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from sglang_probe.errors import ProbeError
from sglang_probe.eviction import Selection, metrics, parse_method, parse_oracle
from tests.eviction.toy import DIM, HEADS, KV_HEADS, LENGTH, STEPS, toy

TRIVIAL = metrics.trivial_mask(LENGTH, sinks=1, window=2)
FREE = [j for j in range(LENGTH) if not TRIVIAL[j]]


def keep_of(positions: list[int]) -> Tensor:
    keep = torch.zeros(1, KV_HEADS, LENGTH, dtype=torch.bool)
    keep[..., positions] = True
    return keep


def random_keep(seed: int = 0) -> Tensor:
    return torch.rand(1, KV_HEADS, LENGTH, generator=torch.Generator().manual_seed(seed)) < 0.5


# Mass -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_step", [False, True])
def test_mass_recalls_are_sums_over_kept_positions(per_step: bool) -> None:
    a = toy().future_attention
    keep = torch.cat([random_keep(t) for t in range(STEPS)]) if per_step else random_keep()
    prompt, total = metrics.prompt_mass_recall(a, keep), metrics.total_mass_recall(a, keep)
    nontrivial = metrics.nontrivial_mass_recall(a, keep, TRIVIAL)
    for g, r, t in product(range(KV_HEADS), range(2), range(STEPS)):
        w, s = a[g, r, t].tolist(), [j for j in range(LENGTH) if keep[t if per_step else 0, g, j]]
        inside, generated = sum(w[j] for j in s), sum(w[LENGTH:])
        assert prompt.each[g, r, t].item() == pytest.approx(inside / sum(w[:LENGTH]))
        assert total.each[g, r, t].item() == pytest.approx(inside + generated)
        expected = sum(w[j] for j in s if j in FREE) / sum(w[j] for j in FREE)
        assert nontrivial.each[g, r, t].item() == pytest.approx(expected)


def test_pooling_is_a_ratio_of_sums_and_not_a_mean_of_ratios() -> None:
    ratio = metrics.Ratio(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 9.0]))
    assert ratio.pooled().item() == pytest.approx(0.1)
    assert ratio.pooled(-1).item() == pytest.approx(0.1)
    assert ratio.each.mean().item() == 0.5
    assert metrics.Ratio(torch.zeros(1), torch.zeros(1)).each.isnan().all()


def test_a_sink_lifts_prompt_recall_and_not_nontrivial_recall() -> None:
    a = torch.full((1, 1, 1, 10), 0.5 / 9)
    a[..., 0] = 0.5
    keep = torch.zeros(1, 1, 10, dtype=torch.bool)
    keep[..., 0] = True
    trivial = metrics.trivial_mask(10, sinks=1, window=0)
    assert metrics.prompt_mass_recall(a, keep).pooled().item() == pytest.approx(0.5)
    assert metrics.nontrivial_mass_recall(a, keep, trivial).pooled().item() == 0.0


def test_expected_masses_of_random_sets_are_means_over_all_subsets() -> None:
    a = toy().future_attention
    nontrivial, prompt = [], []
    for chosen in combinations(FREE, 3):
        keep = keep_of([0, 10, 11, *chosen])
        nontrivial.append(metrics.nontrivial_mass_recall(a, keep, TRIVIAL).pooled())
        prompt.append(metrics.prompt_mass_recall(a, keep).pooled())
    chance = metrics.nontrivial_mass_chance(a, keep, TRIVIAL)
    assert chance.pooled().item() == pytest.approx(torch.stack(nontrivial).mean().item())
    random = metrics.protected_random_mass(a, TRIVIAL, 3)
    assert random.pooled().item() == pytest.approx(torch.stack(prompt).mean().item())


# Overlap --------------------------------------------------------------------------------------------------------------


def test_gold_scores_sum_or_maximise_over_steps_and_heads() -> None:
    a = toy().future_attention
    for g, j in product(range(KV_HEADS), range(LENGTH)):
        table = a[g, :, :, j]
        assert metrics.gold_scores(a, LENGTH)[0, g, j].item() == pytest.approx(float(table.sum()))
        assert metrics.gold_scores(a, LENGTH, horizon=2)[0, g, j].item() == pytest.approx(float(table[:, :2].sum()))
        assert metrics.gold_scores(a, LENGTH, how="max")[0, g, j].item() == float(table.max())
        assert metrics.gold_scores(a, LENGTH, how="per_step")[3, g, j].item() == pytest.approx(float(table[:, 3].sum()))


def test_hit_rate_counts_gold_candidates_that_are_kept() -> None:
    gold = metrics.gold_set(metrics.gold_scores(toy().future_attention, LENGTH), TRIVIAL, 4)
    assert (gold.sum(-1) == 4).all()
    assert not (gold & TRIVIAL).any()
    keep = random_keep()
    for g in range(KV_HEADS):
        both = set(gold[0, g].nonzero().flatten().tolist()) & set(keep[0, g].nonzero().flatten().tolist())
        assert metrics.hit_rate(keep, gold)[0, g].item() == pytest.approx(len(both) / 4)
    oracle = parse_oracle({"oracle": "static_mean", "sinks": 1, "recent": 2}).select(toy(), 7)
    assert (metrics.hit_rate(oracle.keep_TGL, gold) == 1).all()
    assert metrics.jaccard(torch.tensor(0.5)).item() == pytest.approx(1 / 3)  # 2 of 4 shared: 2 / 6


def test_the_chance_of_a_hit_is_the_mean_over_all_subsets_of_candidates() -> None:
    gold = metrics.gold_set(metrics.gold_scores(toy().future_attention, LENGTH), TRIVIAL, 4)
    hits = [metrics.hit_rate(keep_of([0, 10, 11, *c]), gold).mean() for c in combinations(FREE, 4)]
    keep = keep_of([0, 10, 11, *FREE[:4]])
    assert metrics.hit_chance(keep, TRIVIAL)[0, 0].item() == pytest.approx(torch.stack(hits).mean().item())
    # A policy that spends the share of F on candidates has a higher chance level, not a better score.
    assert metrics.hit_chance(keep_of(FREE[:7]), TRIVIAL)[0, 0].item() == pytest.approx(7 / 9)


def test_a_budget_that_leaves_no_candidate_is_refused() -> None:
    assert metrics.candidate_budget(7, TRIVIAL) == 4
    assert metrics.candidate_budget(99, TRIVIAL) == 9
    with pytest.raises(ProbeError, match="budget of 3 leaves no candidate after 3 trivial"):
        metrics.candidate_budget(3, TRIVIAL)


# Ranks ----------------------------------------------------------------------------------------------------------------


def order(x: list[float]) -> list[int]:
    return sorted(range(len(x)), key=lambda j: (-x[j], j))


def plain_ndcg(predicted: list[float], gold: list[float], depth: int) -> float:
    def dcg(ranking: list[int]) -> float:
        return sum(gold[j] / math.log2(i + 2) for i, j in enumerate(ranking[:depth]))

    return dcg(order(predicted)) / dcg(order(gold))


def plain_rbo(a: list[float], b: list[float], p: float) -> float:
    x, y = order(a), order(b)
    return sum((1 - p) * p ** (d - 1) * len(set(x[:d]) & set(y[:d])) / min(d, len(x)) for d in range(1, 3000))


GOLD = [0.5, 0.1, 0.25, 0.1, 0.05]


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_ndcg_and_its_chance_level_over_all_rankings(depth: int) -> None:
    gold = torch.tensor(GOLD, dtype=torch.float64)
    values = []
    for ranking in permutations(range(5)):
        predicted = [float(-ranking.index(j)) for j in range(5)]
        ours = metrics.ndcg(torch.tensor(predicted), gold, depth).item()
        assert ours == pytest.approx(plain_ndcg(predicted, GOLD, depth))
        values.append(ours)
    assert metrics.ndcg_chance(gold, depth).item() == pytest.approx(sum(values) / len(values))
    assert max(values) == pytest.approx(1.0)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.98])
def test_rbo_and_its_chance_level_over_all_rankings(p: float) -> None:
    values = []
    for ranking in permutations(range(5)):
        predicted = [float(-ranking.index(j)) for j in range(5)]
        ours = metrics.rbo(torch.tensor(predicted), torch.tensor(GOLD), p=p).item()
        assert ours == pytest.approx(plain_rbo(predicted, GOLD, p))
        values.append(ours)
    assert metrics.rbo_chance(5, p=p) == pytest.approx(sum(values) / len(values))
    assert max(values) == pytest.approx(1.0)


def test_the_ranking_of_a_kept_set_sees_what_is_kept_and_in_which_order() -> None:
    """The chance levels by enumeration of all kept sets in all orders."""
    gold, kept = torch.tensor(GOLD), torch.tensor([True, False, True, False, False])
    scores = torch.tensor([1.0, 9.0, 2.0, 8.0, 7.0])  # the best scores are not kept
    order = [2, 0]
    best = sum(g / math.log2(r + 2) for r, g in enumerate(sorted(GOLD, reverse=True)[:2]))
    expected = sum(GOLD[j] / math.log2(r + 2) for r, j in enumerate(order)) / best
    assert metrics.ndcg(scores, gold, 2, kept=kept).item() == pytest.approx(expected)
    assert metrics.ndcg(scores, gold, 2).item() != pytest.approx(expected)
    ndcgs, rbos = [], []
    for order in permutations(range(5)):
        mine = torch.zeros(5, dtype=torch.bool)
        mine[list(order[:2])] = True
        ranked = torch.tensor([-float(order.index(j)) for j in range(5)])
        ndcgs.append(metrics.ndcg(ranked, gold, 2, kept=mine).item())
        rbos.append(metrics.rbo(ranked, gold, kept=mine).item())
        top = [
            set(order[: min(d, 2)]) & set(torch.tensor(GOLD).argsort(descending=True)[:d].tolist()) for d in range(1, 6)
        ]
        plain = sum(0.1 * 0.9 ** (d - 1) * len(x) / d for d, x in enumerate(top, 1)) + 0.9**5 * 2 / 5
        assert rbos[-1] == pytest.approx(plain)
    assert metrics.ndcg_chance(gold, 2, kept=kept).item() == pytest.approx(sum(ndcgs) / len(ndcgs))
    assert metrics.rbo_chance(5, kept=kept).item() == pytest.approx(sum(rbos) / len(rbos))


def test_a_kept_set_of_everything_is_ranked_as_its_scores_are() -> None:
    scores, gold, every = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0]), torch.tensor(GOLD), torch.ones(5, dtype=torch.bool)
    assert metrics.ndcg(scores, gold, 5, kept=every) == metrics.ndcg(scores, gold, 5)
    assert metrics.rbo(scores, gold, kept=every) == metrics.rbo(scores, gold)


def test_kendall_on_the_union_of_top_sets_is_that_of_scipy() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 6, (3, 2, 20), generator=g).double() for _ in range(2))
    ours = metrics.kendall_top(a, b, 5)
    for i, j in product(range(3), range(2)):
        x, y = a[i, j].tolist(), b[i, j].tolist()
        union = sorted(set(order(x)[:5]) | set(order(y)[:5]))
        expected = stats.kendalltau([x[u] for u in union], [y[u] for u in union]).statistic
        assert ours[i, j].item() == pytest.approx(expected)


# Distances ------------------------------------------------------------------------------------------------------------


def test_distances_are_those_of_scipy_and_reach_their_bounds() -> None:
    g = np.random.default_rng(0)
    a, b = g.random((4, 7)), g.random((4, 7))
    a[0, 3] = b[1, 2] = 0.0
    ours = metrics.jensen_shannon(torch.tensor(a), torch.tensor(b))
    np.testing.assert_allclose(ours, jensenshannon(a, b, axis=1) ** 2, rtol=1e-10)
    p, q = a / a.sum(1, keepdims=True), b / b.sum(1, keepdims=True)
    np.testing.assert_allclose(metrics.total_variation(torch.tensor(a), torch.tensor(b)), abs(p - q).sum(1) / 2)
    smooth = [(x + 0.01) / (x + 0.01).sum(1, keepdims=True) for x in (p, q)]
    np.testing.assert_allclose(
        metrics.kl(torch.tensor(a), torch.tensor(b), smoothing=0.01), stats.entropy(*smooth, axis=1), rtol=1e-10
    )
    apart = metrics.jensen_shannon(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 5.0]))
    assert apart.item() == pytest.approx(math.log(2))
    assert metrics.jensen_shannon(torch.tensor(a), torch.tensor(3 * a)).abs().max() < 1e-15


# Output error ---------------------------------------------------------------------------------------------------------


def test_the_output_error_is_that_of_attention_over_the_kept_keys_alone() -> None:
    layer, keep = toy(), random_keep(1)
    error = metrics.output_error(layer, keep)
    a, v = layer.future_attention, layer.future_values
    full, cut = torch.empty(STEPS, HEADS, DIM).double(), torch.empty(STEPS, HEADS, DIM).double()
    for t, h in product(range(STEPS), range(HEADS)):
        g = h // 2
        w = a[g, h % 2, t]
        kept = w * torch.cat([keep[0, g], torch.ones(STEPS, dtype=torch.bool)])
        full[t, h], cut[t, h] = w @ v[:, g], kept @ v[:, g] / kept.sum()
        expected = (cut[t, h] - full[t, h]).norm() / full[t, h].norm()
        assert error.relative_GRT[g, h % 2, t].item() == pytest.approx(expected.item())
        assert error.evicted_GRT[g, h % 2, t].item() == pytest.approx(1 - kept.sum().item())
    torch.testing.assert_close(error.relative_GRT, error.evicted_GRT * error.gap_GRT)
    assert layer.w_o_HDM is not None
    projected = [torch.einsum("thd,hdm->tm", o, layer.w_o_HDM).norm(dim=-1) for o in (cut - full, full)]
    assert error.projected_T is not None
    torch.testing.assert_close(error.projected_T, projected[0] / projected[1])


def test_keeping_everything_has_exactly_no_error_and_selections_may_change_by_step() -> None:
    layer = toy()
    everything = metrics.output_error(layer, torch.ones(1, KV_HEADS, LENGTH, dtype=torch.bool))
    assert (everything.relative_GRT == 0).all()
    assert everything.projected_T is not None
    assert (everything.projected_T == 0).all()
    keep = torch.cat([random_keep(t) for t in range(STEPS)])
    each = metrics.output_error(layer, keep).relative_GRT
    for t in range(STEPS):
        torch.testing.assert_close(each[..., t], metrics.output_error(layer, keep[t : t + 1]).relative_GRT[..., t])


# Regret, dispersion, bytes --------------------------------------------------------------------------------------------


def test_gap_closed_is_0_for_protected_random_and_1_for_the_oracle() -> None:
    policy, oracle, random = torch.tensor([0.2, 0.6, 0.4, 0.3]), torch.tensor([0.6, 0.6, 0.6, 0.3]), 0.2
    closed = metrics.gap_closed(policy, oracle, torch.tensor([random, random, random, 0.3]))
    assert closed[:3].tolist() == pytest.approx([0.0, 1.0, 0.5])
    assert closed[3].isnan()
    assert metrics.regret(policy, oracle).tolist() == pytest.approx([0.4, 0.0, 0.2, 0.0])


def test_spread_over_heads_leaves_out_heads_without_a_value() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, torch.nan]])
    s = metrics.spread(x)
    assert (s.heads, s.mean, s.q50) == (3, 2.0, 2.0)
    pairs = sum(abs(a - b) for a in (1, 2, 3) for b in (1, 2, 3)) / 9
    assert s.gini == pytest.approx(pairs / (2 * 2))
    assert s.cv == pytest.approx(np.std([1, 2, 3]) / 2)
    assert metrics.gini(torch.zeros(4)) == 0.0
    assert metrics.share_below(x, torch.full((2, 2), 2.5)) == pytest.approx(2 / 3)
    with pytest.raises(ProbeError):
        metrics.spread(torch.tensor([torch.nan]))


def test_the_global_eviction_ratio_counts_needed_positions_that_every_head_lost() -> None:
    keep = torch.zeros(2, 2, 5, dtype=torch.bool)
    keep[0, 1, 2] = keep[1, 0, 4] = True
    needed = torch.tensor([False, True, True, True, False])
    assert metrics.global_eviction_ratio(keep, needed) == pytest.approx(2 / 3)
    assert metrics.global_eviction_ratio(keep[:1, :1], needed) == 1.0
    with pytest.raises(ProbeError, match="no position is needed"):
        metrics.global_eviction_ratio(keep, torch.zeros(5, dtype=torch.bool))


def test_the_chance_of_global_eviction_is_the_mean_over_all_draws() -> None:
    trivial = torch.tensor([True, False, False, False, False])
    needed = torch.tensor([True, True, False, True, False])
    values = []
    for first, second in product(combinations(range(1, 5), 2), combinations(range(1, 5), 1)):
        keep = torch.zeros(1, 2, 5, dtype=torch.bool)
        keep[..., 0] = True
        keep[0, 0, list(first)] = keep[0, 1, list(second)] = True
        values.append(metrics.global_eviction_ratio(keep, needed))
    assert metrics.global_eviction_chance(keep, needed, trivial) == pytest.approx(sum(values) / len(values))


def test_bytes_count_what_is_stored() -> None:
    keep = torch.zeros(2, 1, KV_HEADS, LENGTH, dtype=torch.bool)
    keep[0, 0, 0, :4] = keep[0, 0, 1, 3:5] = keep[1, 0, :, 11] = True  # layer 0: 4 and 2 entries, layer 1: 1 and 1
    selection = Selection(keep, keep.float(), evicts=True)
    entry = 2 * DIM * 2
    full = 2 * KV_HEADS * LENGTH * entry
    kept = metrics.cost(selection, head_dim=DIM, itemsize=2)
    assert (kept.kept, kept.tokens_per_head, kept.bytes, kept.bytes_full) == (8, 2.0, 8 * entry, full)
    assert kept.share == pytest.approx(2 / 12)
    assert kept.as_dict()["bytes_share"] == pytest.approx(8 / 48)
    assert metrics.cost(selection, head_dim=DIM, itemsize=2, storage="masked").bytes == full
    # Pages of 5 over 12 positions (5, 5, 2): layer 0 holds the first for both heads, layer 1 the last.
    assert metrics.cost(selection, head_dim=DIM, itemsize=2, storage="paged", page=5).bytes == (5 + 2) * 2 * entry
    peak = metrics.cost(selection, head_dim=DIM, itemsize=2, extra_tokens=8).bytes_peak
    assert peak == 2 * KV_HEADS * (LENGTH + 8) * entry


def test_selections_and_copies_per_query_head_cost_what_they_hold() -> None:
    quest = parse_method({"method": "quest", "page": 2, "min_pages": 1, "dense_layers": 0}).select(toy(), 4)
    cost = metrics.cost(quest, head_dim=DIM, itemsize=2)
    assert cost.tokens_per_head == 4
    assert cost.bytes == cost.bytes_full
    wide = parse_method({"method": "snapkv", "window": 2}).select(toy().per_query_head(), 6)
    cost = metrics.cost(wide, head_dim=DIM, itemsize=2, group=2)
    assert cost.bytes == cost.bytes_full  # half of the positions, twice the heads


@pytest.mark.parametrize("seed", range(3))
def test_protected_random_reaches_its_chance_level_on_average(seed: int) -> None:
    """The implementation of the policy agrees with the closed form that reports print beside it."""
    layer = toy(seed)
    found = []
    for draw in range(400):
        policy = parse_method({"method": "protected_random", "sinks": 1, "recent": 2, "seed": draw})
        keep = policy.select(layer, 6).keep_TGL
        found.append(metrics.nontrivial_mass_recall(layer.future_attention, keep, TRIVIAL).pooled())
    chance = metrics.nontrivial_mass_chance(layer.future_attention, keep, TRIVIAL).pooled()
    error = torch.stack(found).std() / 20
    assert abs(torch.stack(found).mean() - chance) < 4 * error
