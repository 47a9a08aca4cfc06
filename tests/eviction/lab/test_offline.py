"""The grid on toy requests: every number is that of the metric alone, controls are judged on the true layer, and what
cannot be judged is listed."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch

from sglang_probe.errors import ProbeError
from sglang_probe.eviction import Layer, Queries, metrics, parse_method, stack
from sglang_probe.eviction.base import Selection
from sglang_probe.eviction.protocol import Protocol, under
from sglang_probe.studies.evict.controls import CONTROLS
from sglang_probe.studies.evict.grid import BASELINE, Trivial, entries_of
from sglang_probe.studies.evict.judge import METRICS, Judge, check_counts
from sglang_probe.studies.evict.layers import Batch
from sglang_probe.studies.evict.lookahead_runs import Ahead
from sglang_probe.studies.evict.offline import Offline, run_offline, spoiled
from tests.eviction.toy import DIM, HEADS, KV_HEADS, LENGTH, toy

TRIVIAL = Trivial(sinks=1, window=2)
VISIBLE, HIDDEN = Protocol.QUERY_VISIBLE, Protocol.QUERY_HIDDEN
CONTEXT = 10


def batch(requests: int = 3, layers: int = 2) -> Batch:
    """Requests by layers of toy layers, as `batches` stacks them."""
    rows = [
        stack([replace(toy(10 * b + y, num_layers=layers), index=torch.tensor(y), lookahead={}) for y in range(layers)])
        for b in range(requests)
    ]
    layer = stack([replace(r, request=torch.full((layers,), b)) for b, r in enumerate(rows)])
    return Batch(tuple(f"r{b}" for b in range(requests)), CONTEXT, layer, 2)


def grid(methods: list, oracles: list, protocols: tuple[Protocol, ...] = (VISIBLE,), **more: object) -> Offline:
    out = Offline()
    budgets = more.pop("budgets", [Fraction(1, 2)])
    entries = entries_of(methods, oracles, TRIVIAL, seed=0)
    run_offline("toy", [batch()], entries, budgets, protocols, TRIVIAL, out=out, **more)  # type: ignore[arg-type]
    return out


def test_a_request_in_a_batch_has_the_numbers_it_has_alone() -> None:
    rows, _, _ = grid(["snapkv", {"method": "tova"}], ["static_mean", "per_step"], budgets=[5, 8]).frames()
    for b, policy, budget in [(0, "tova", 5), (2, "static_mean", 8), (1, "per_step", 5)]:
        one = batch().layer
        alone = Layer(**{f: _at(getattr(one, f), b) for f in Layer.__dataclass_fields__})
        entry = next(e for e in entries_of(["tova"], ["static_mean", "per_step"], TRIVIAL, 0) if e.label == policy)
        selection = entry.policy.select(alone, budget)
        trivial = metrics.trivial_mask(LENGTH, sinks=1, window=2)
        a, keep = alone.future_attention, selection.keep_TGL
        found = rows[(rows["rid"] == f"r{b}") & (rows["policy"] == policy) & (rows["budget"] == str(budget))].iloc[0]
        assert found["nontrivial"] == pytest.approx(metrics.nontrivial_mass_recall(a, keep, trivial).pooled().item())
        assert found["mass"] == pytest.approx(metrics.total_mass_recall(a, keep).pooled().item())
        gold = metrics.gold_set(metrics.gold_scores(a, LENGTH, how="max"), trivial, budget - 3)
        assert found["hit_max"] == pytest.approx(metrics.hit_rate(keep, gold).mean().item())
        assert found["output_error"] == pytest.approx(metrics.output_error(alone, keep).projected_T.mean().item())
        share = (keep & ~trivial).sum(-1).double().mean().item() / int((~trivial).sum())
        assert found["hit_chance"] == pytest.approx(share)
        assert (found["tokens"], found["length"], found["share"]) == (budget, LENGTH, pytest.approx(budget / LENGTH))


def _at(value: object, b: int) -> object:
    if isinstance(value, torch.Tensor):
        return value[b]
    if isinstance(value, Queries):
        return Queries(value.q_THD[b], value.k_TGD[b], value.v_TGD[b], value.skip)  # type: ignore[index]
    return value


def test_a_set_by_query_head_is_judged_by_query_head_at_as_many_times_the_bytes() -> None:
    snapkv = {"method": "snapkv", "window": 2, "kernel": 1}
    kept: list[str] = []
    out = grid(
        [snapkv, {**snapkv, "per_query_head": True}],
        [],
        budgets=[5],
        keep=lambda task, protocol, entry, budget, batch, keep: kept.append(entry.label),
    )
    rows, heads, _ = out.frames()
    wide = rows[rows["policy"] == "snapkv window 2, kernel 1, per query head"].set_index("rid")
    narrow = rows[rows["policy"] == "snapkv window 2, kernel 1"].set_index("rid")
    layer = batch().layer.per_query_head()
    keep = parse_method(snapkv).select(layer, 5).keep_TGL
    assert keep.shape[-2] == HEADS
    held = metrics.total_mass_recall(layer.future_attention, keep)
    expected = held.numerator.flatten(1).sum(1) / held.denominator.flatten(1).sum(1)
    assert wide["mass"].to_numpy() == pytest.approx(expected.numpy())
    assert (wide["bytes"] == 2 * narrow["bytes"]).all()
    assert (wide["bytes_full"] == narrow["bytes_full"]).all()
    assert len(heads[heads["policy"] == "snapkv window 2, kernel 1, per query head"]) == 2 * HEADS
    assert kept == [BASELINE, "snapkv window 2, kernel 1"]


def test_rows_of_heads_add_up_to_the_pooled_recall() -> None:
    rows, heads, _ = grid(["keydiff"], []).frames()
    mine = heads[heads["policy"] == "keydiff"]
    assert len(mine) == 2 * HEADS
    one = rows[rows["policy"] == "keydiff"]
    weights = one["nontrivial_share"]
    assert mine["held"].sum() / mine["mass"].sum() == pytest.approx(np.average(one["nontrivial"], weights=weights))


def test_the_hidden_protocol_compresses_the_context_alone() -> None:
    rows, _, _ = grid(["knorm"], [], (VISIBLE, HIDDEN)).frames()
    assert rows.groupby("protocol")["length"].unique().map(list).to_dict() == {
        "query_visible": [LENGTH],
        "query_hidden": [CONTEXT],
    }
    assert rows.groupby("protocol")["tokens"].unique().map(list).to_dict() == {
        "query_visible": [6],
        "query_hidden": [5],
    }


def test_a_budget_without_room_for_the_protected_set_is_excluded_by_name() -> None:
    out = grid(["knorm", {"method": "snapkv", "window": 4}], [], budgets=[4])
    rows, _, excluded = out.frames()
    assert set(rows["policy"]) == {BASELINE, "knorm", "snapkv"}
    tight = grid(["knorm", {"method": "snapkv", "window": 5}], [], budgets=[4]).frames()[2]
    assert tight[["policy", "requests"]].values.tolist() == [["snapkv", 3]]
    assert "does not hold" in tight["reason"].iloc[0]
    assert not len(excluded)


def test_controls_select_on_the_spoiled_layer_and_are_judged_on_the_true_one() -> None:
    entries = entries_of([{"method": "snapkv", "window": 2, "pooling": "none"}], [], TRIVIAL, 0)
    out = Offline()
    run_offline("toy", [batch(6)], entries, [6], [VISIBLE], TRIVIAL, controls_of=entries[1:], out=out)
    rows, _, _ = out.frames()
    controls = rows[rows["kind"] == "control"]
    assert set(controls["policy"]) == {f"snapkv: {name}" for name in CONTROLS}
    true = under(VISIBLE, batch(6).layer, context=CONTEXT)
    spoiled = CONTROLS["shuffled keys"](true, 0)
    keep = entries[1].policy.select(spoiled, 6).keep_TGL
    trivial = metrics.trivial_mask(LENGTH, sinks=1, window=2)
    ratio = metrics.nontrivial_mass_recall(true.future_attention, keep, trivial)
    expected = ratio.numerator.flatten(1).sum(1) / ratio.denominator.flatten(1).sum(1)
    found = controls[controls["policy"] == "snapkv: shuffled keys"]["nontrivial"]
    assert found.to_numpy() == pytest.approx(expected.numpy())


def test_each_control_spoils_what_it_is_named_after() -> None:
    layer = batch().layer
    keys = CONTROLS["shuffled keys"](layer, 0).k_LGD
    assert not torch.equal(keys, layer.k_LGD)
    assert torch.equal(keys.sort(-3).values, layer.k_LGD.sort(-3).values)
    others = CONTROLS["queries of another request"](layer, 0).q_NHD
    assert torch.equal(others[1], layer.q_NHD[0])
    ahead = replace(layer, lookahead={"laq": layer.future})  # type: ignore[dict-item]
    mixed = CONTROLS["queries of another request"](ahead, 0).lookahead["laq"].q_THD
    assert torch.equal(mixed[1], layer.future.q_THD[0])  # type: ignore[union-attr]
    moved = CONTROLS["window at the wrong position"](layer, 0)
    assert torch.equal(moved.last_queries(2), layer.q_NHD[:, :, LENGTH // 2 - 2 : LENGTH // 2])


def test_lookahead_queries_of_the_protocol_and_budget_are_used_and_their_absence_is_listed() -> None:
    g = torch.Generator().manual_seed(0)
    ahead = Ahead()
    for budget in ("5", "8"):
        ahead.found[(VISIBLE.value, "laq", budget)] = {
            f"r{b}": (torch.randn(2, 3, HEADS, DIM, generator=g), torch.randn(2, 3, KV_HEADS, DIM, generator=g))
            for b in range(3)
        }
    laq = {"method": "laq", "recent": 2, "pooling": "none"}
    out = grid([laq], [], (VISIBLE, HIDDEN), budgets=[5, 8], ahead=ahead)
    rows, _, excluded = out.frames()
    assert set(excluded["protocol"]) == {"query_hidden"}
    given = ahead.found[(VISIBLE.value, "laq", "8")]
    q = torch.stack([given[f"r{b}"][0] for b in range(3)])
    mine = replace(batch().layer, lookahead={"laq": Queries(q)})
    keep = parse_method(laq).select(mine, 8).keep_TGL
    a = batch().layer.future_attention
    held = metrics.prompt_mass_recall(a, keep)
    expected = held.numerator.flatten(1).sum(1) / held.denominator.flatten(1).sum(1)
    found = rows[(rows["policy"] == "laq") & (rows["budget"] == "8")]["prompt_mass"]
    assert found.to_numpy() == pytest.approx(expected.numpy(), rel=1e-5)


def test_lookahead_methods_have_their_own_lookahead_queries_spoiled() -> None:
    laq = next(e for e in entries_of(["laq", "knorm"], [], TRIVIAL, 0) if e.label == "laq")
    assert [e.label for e, _ in spoiled([laq])] == ["laq: shuffled keys", "laq: queries of another request"]


def test_kept_counts_are_asserted_and_a_wrong_one_is_fatal() -> None:
    out = grid(["random", {"method": "adakv", "base": {"method": "snapkv", "window": 2}}, "pyramidkv"], [], budgets=[5])
    assert out.asserted == 3 * 3  # pyramidkv's window of 32 does not fit, the baseline does
    layer, policy = batch().layer, parse_method("random")
    selection = policy.select(layer, 5)
    broken = selection.keep_TGL.clone()
    broken[1, 0, 0, 0, :] = True
    with pytest.raises(ProbeError, match="keeps 20 to 27 entries of a request and not 20"):
        check_counts(policy, Selection(broken, selection.scores_TGL, evicts=True), 5)


def test_every_metric_is_measured_and_described() -> None:
    rows, _, _ = grid([], ["static_mean"]).frames()
    assert set(METRICS) <= set(rows.columns)
    assert not rows[rows["policy"] == "static_mean"][list(METRICS)].isna().any().any()
    mine = rows[rows["policy"] == "static_mean"]
    assert mine["js"].to_numpy() == pytest.approx(0.0, abs=1e-6)
    assert mine["ndcg"].to_numpy() == pytest.approx(1.0)


def test_a_judge_refuses_a_budget_that_leaves_no_candidate() -> None:
    judge = Judge(batch().layer, TRIVIAL, 2)
    policy = parse_method("random")
    with pytest.raises(ProbeError, match="leaves no candidate"):
        judge(policy, policy.select(batch().layer, 3), 3)


def test_frames_name_their_cells() -> None:
    rows, heads, excluded = grid(["knorm"], []).frames()
    for frame in (rows, heads, excluded):
        assert list(frame.columns[:5]) == ["task", "protocol", "kind", "policy", "budget"]
    assert isinstance(rows, pd.DataFrame)


def test_with_the_question_hidden_other_positions_are_needed() -> None:
    found = batch()
    visible, hidden = (torch.zeros(3, 2, LENGTH, dtype=torch.bool) for _ in range(2))
    visible[..., [3, CONTEXT]], hidden[..., [3, 5]] = True, True
    found = replace(found, layer=replace(found.layer, needed_L=visible), hidden_needed_L=hidden)
    kept = {p: found.under(p).needed_L for p in (VISIBLE, HIDDEN)}
    assert kept[VISIBLE][0, 0].nonzero().flatten().tolist() == [3, CONTEXT]
    assert kept[HIDDEN][0, 0].nonzero().flatten().tolist() == [3, 5]
    assert kept[HIDDEN].shape[-1] == CONTEXT


def test_needed_positions_kept_are_counted_among_candidates() -> None:
    # The first position and the last two are kept by all; the last four by this policy.
    for needed, kept in (([0, 3, LENGTH - 4], 0.5), ([LENGTH - 4], 1.0), ([2, 3], 0.0), ([0, LENGTH - 1], None)):
        needed_L = torch.zeros(3, 2, LENGTH, dtype=torch.bool)
        needed_L[..., needed] = True
        layer = replace(batch().layer, needed_L=needed_L)
        policy = parse_method({"method": "streaming_llm", "sinks": 1})
        found = Judge(layer, TRIVIAL, 2)(policy, policy.select(layer, 5), 5).by_request
        assert found["needed_kept"].tolist() == pytest.approx([float("nan") if kept is None else kept] * 3, nan_ok=True)
        chance = float("nan") if kept is None else 2 / (LENGTH - 3)
        assert found["needed_kept_chance"].tolist() == pytest.approx([chance] * 3, nan_ok=True)
