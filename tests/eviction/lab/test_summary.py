"""From rows to tables: what is paired with what, what is tested, and what predicts what."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sglang_probe.errors import ProbeError
from sglang_probe.studies.evict.asked import ALL_KEPT, FULL_CACHE, asked_of, check_served, over_repeats, with_full
from sglang_probe.studies.evict.grid import BASELINE, Trivial, caveats, entries_of
from sglang_probe.studies.evict.outcome import OUTCOMES, compare, judge_outputs
from sglang_probe.studies.evict.predict import ALL, predictor_pairs, predictors
from sglang_probe.studies.evict.summary import gaps, means, protection

RIDS = [f"r{i}" for i in range(8)]


def rows(values: dict[tuple[str, str, str], list[float]], metric: str = "nontrivial", task: str = "t") -> pd.DataFrame:
    """Rows of (kind, policy, budget) with a value per prompt."""
    return pd.concat(
        [
            pd.DataFrame({"task": task, "protocol": "p", "kind": k, "policy": n, "budget": b, "rid": RIDS, metric: v})
            for (k, n, b), v in values.items()
        ],
        ignore_index=True,
    )


RANDOM = {("baseline", BASELINE, "1/8"): [0.1] * 8, ("baseline", BASELINE, "1/2"): [0.5] * 8}


def test_differences_are_to_protected_random_at_the_same_budget() -> None:
    better = list(np.linspace(0.2, 0.3, 8))
    frame = rows({**RANDOM, ("method", "m", "1/8"): better, ("method", "m", "1/2"): [0.4] * 8})
    found = means(frame, ["nontrivial"]).set_index(["policy", "budget"])
    assert found.loc[("m", "1/8"), "difference"] == pytest.approx(0.15)
    assert found.loc[("m", "1/8"), "difference_low"] > 0.1
    assert found.loc[("m", "1/2"), "difference"] == pytest.approx(-0.1)
    assert np.isnan(found.loc[(BASELINE, "1/8"), "difference"])
    # Two methods' cells: 2 of 2^8 sign patterns are as extreme in each, and Holm doubles the smaller.
    assert found.loc[("m", "1/8"), ["p", "p_holm"]].tolist() == pytest.approx([2 / 256, 4 / 256])


def test_oracles_and_controls_are_shown_and_not_tested() -> None:
    frame = rows({**RANDOM, ("oracle", "o", "1/8"): [0.9] * 8, ("control", "c", "1/8"): [0.1] * 8})
    found = means(frame, ["nontrivial"]).set_index("policy")
    assert found["p"].isna().all()
    assert found.loc["o", "difference"] == pytest.approx(0.8)


def test_methods_as_published_are_not_tested_and_stand_beside_themselves_on_equal_terms() -> None:
    equal, own = [0.5 + 0.01 * i for i in range(8)], [0.3 + 0.02 * i for i in range(8)]
    cells = {("method", "m", "1/8"): equal, ("published", "m", "1/8"): own, ("published", "random", "1/8"): own}
    frame = rows({**RANDOM, **cells, ("method", "n", "1/2"): own})
    found = means(frame, ["nontrivial"])
    assert found[found["p"].notna()]["kind"].unique().tolist() == ["method"]
    (r,) = protection(frame, ["nontrivial"]).to_dict("records")
    assert (r["policy"], r["budget"], r["n"]) == ("m", "1/8", 8)
    assert [r["equal"], r["published"], r["difference"]] == pytest.approx([0.535, 0.37, 0.165])
    assert 0.1 < r["difference_low"] < 0.165 < r["difference_high"] < 0.23
    assert protection(rows(RANDOM), ["nontrivial"]).empty


def test_chance_levels_and_prompts_without_a_value() -> None:
    frame = rows({**RANDOM, ("method", "m", "1/8"): [0.3, np.nan, *[0.3] * 6]}).assign(nontrivial_chance=0.2)
    found = means(frame, ["nontrivial"]).set_index(["policy", "budget"])
    assert found.loc[("m", "1/8"), ["n", "mean", "chance"]].tolist() == pytest.approx([7, 0.3, 0.2])


def test_gaps_are_pooled_before_they_are_divided() -> None:
    base, mine, best = [0.0] * 8, [0.1] * 4 + [0.9] * 4, [0.2] * 4 + [1.8] * 4
    frame = rows({("baseline", BASELINE, "1"): base, ("method", "m", "1"): mine, ("oracle", "o", "1"): best})
    found = gaps(frame, "nontrivial", "o").set_index("policy")
    assert list(found.index) == ["m"]
    assert found.loc["m", "closed"] == pytest.approx(0.5)
    assert found.loc["m", "regret"] == pytest.approx(0.5)
    assert np.isnan(found.loc["m", "closed_low"])  # half in every prompt: nothing varies
    assert found.loc["m", "regret_low"] < 0.5 < found.loc["m", "regret_high"]


def test_a_bound_below_random_leaves_no_gap_to_close() -> None:
    frame = rows({**RANDOM, ("method", "m", "1/2"): [0.4] * 8}).assign(full_cache=0.3)
    found = gaps(frame, "nontrivial", None, upper="full_cache")
    assert np.isnan(found.loc[found["policy"] == "m", "closed"]).all()


def test_a_metric_that_orders_methods_as_the_outcome_does_predicts_it_and_oracles_have_no_say() -> None:
    level = {"a": 0.1, "b": 0.2, "c": 0.3, BASELINE: 0.15}
    cells = {("baseline" if p == BASELINE else "method", p, "1/8"): [v] * 8 for p, v in level.items()}
    offline = rows({**cells, ("oracle", "o", "1/8"): [0.9] * 8}).assign(output_error=lambda f: -f["nontrivial"])
    outcomes = rows({k: [x**2 for x in v] for k, v in cells.items()} | {("oracle", "o", "1/8"): [0.0] * 8}, "accuracy")
    found = predictors(offline, outcomes, ["nontrivial", "output_error"], "accuracy")
    every = found[found["task"] == ALL].set_index("metric")
    assert every["spearman"].tolist() == pytest.approx([1.0, 1.0])
    assert every["policies"].tolist() == [4, 4]
    turned = outcomes.assign(accuracy=-outcomes["accuracy"])
    assert predictors(offline, turned, ["nontrivial"], "accuracy")["spearman"].iloc[0] == -1.0


def test_metrics_are_told_apart_over_policies() -> None:
    """`mass` and `hit` order 20 policies nearly as the outcome does, and `ndcg` does not."""
    rng = np.random.default_rng(0)
    good = dict(zip([*"abcdefghijklmnopqrs", BASELINE], rng.permutation(20), strict=True))
    sizes = {"mass": 2.0, "hit": 2.5, "ndcg": 20.0}
    cell = {p: ("baseline" if p == BASELINE else "method", p, "1/8") for p in good}
    outcomes = rows({cell[p]: [float(g)] * 8 for p, g in good.items()}, "accuracy")
    offline = None
    for metric, size in sizes.items():
        mine = rows({cell[p]: [g + size * rng.normal()] * 8 for p, g in good.items()}, metric)
        offline = mine if offline is None else offline.assign(**{metric: mine[metric]})
    assert offline is not None
    found = predictors(offline, outcomes, list(sizes), "accuracy")
    every = found[found["task"] == ALL].set_index("metric")
    close = every.loc[["mass", "hit"]].sort_values("below_best")
    assert close["below_best"].iloc[0] == 0
    assert close["below_best_low"].iloc[1] < 0 < close["below_best_high"].iloc[1]
    assert (every["low"] < every["spearman"]).all()
    assert (every["spearman"] < every["high"]).all()
    assert every.loc["ndcg", "below_best_low"] > 0.1
    pairs = predictor_pairs(offline, outcomes, list(sizes), "accuracy").set_index(["metric", "other"])
    best, second = close.index
    assert pairs.index.tolist() == [(best, second), (best, "ndcg"), (second, "ndcg")]
    assert pairs["told"].tolist() == [False, True, True]
    assert pairs["difference"].iloc[0] == close["below_best"].iloc[1]


def test_prompts_that_rank_policies_otherwise_widen_the_interval() -> None:
    """The same means of 12 policies, from prompts that agree and from prompts that do not."""
    rng = np.random.default_rng(1)
    good = dict(zip([*"abcdefghijk", BASELINE], rng.normal(size=12), strict=True))
    cell = {p: ("baseline" if p == BASELINE else "method", p, "1/8") for p in good}
    spread = rng.normal(size=(12, 8)) * 2
    spread -= spread.mean(1, keepdims=True)
    seen = {p: g + 0.3 * rng.normal() for p, g in good.items()}
    outcomes = rows({cell[p]: [g] * 8 for p, g in good.items()}, "accuracy")
    calm = rows({cell[p]: [seen[p]] * 8 for p in good}, "mass")
    wild = rows({cell[p]: list(seen[p] + spread[i]) for i, p in enumerate(good)}, "mass")
    found = [predictors(x, outcomes, ["mass"], "accuracy").iloc[0] for x in (calm, wild)]
    assert found[0]["spearman"] == pytest.approx(found[1]["spearman"])
    assert found[1]["high"] - found[1]["low"] > found[0]["high"] - found[0]["low"] + 0.02


def test_a_method_that_is_not_made_for_so_few_layers_is_said_to_be_so() -> None:
    found = entries_of(["snapkv", "pyramidkv", {"method": "pyramidkv", "window": 8}], [], Trivial(), 0)
    (said,) = caveats(found, 2)
    assert "PyramidKV" in said
    assert "with 2 the last" in said
    assert caveats(found, 32) == []


def test_outcomes_of_an_output_are_counted_behind_the_first_token() -> None:
    # Answers at steps 0, 2 and 4; the second one is wrong, and so is a token that is no answer.
    found = compare([7, 1, 9, 3, 6], [7, 2, 8, 3, 6], [7, 8, 6], [0, 2, 4])
    assert found == {
        "accuracy": 0.5,
        "success": 0.0,
        "first_answer": 1.0,
        "agreement": 0.5,
        "divergence": 1.0,
        "truncated": False,
    }
    same = compare([7, 2, 8, 3, 6], [7, 2, 8, 3, 6], [7, 8, 6], [0, 2, 4])
    assert (same["success"], same["divergence"]) == (1.0, 5.0)


def test_a_token_that_is_missing_is_wrong_and_the_output_is_truncated() -> None:
    found = compare([7, 8], [7, 8, 9], [7, 8, 9], [0, 1, 2])
    assert (found["accuracy"], found["divergence"], found["truncated"]) == (0.5, 2.0, True)


def test_a_request_that_was_not_served_has_failed() -> None:
    asked = pd.DataFrame({"rid": ["q0", "q1"], "source": ["r0", "r0"]})
    outputs = pd.DataFrame({"rid": ["q0"], "output_ids": [[1, 2]]})
    sources = pd.DataFrame({"rid": ["r0"], "output_ids": [[1, 2]], "answer_ids": [[1, 2]], "answer_steps": [[0, 1]]})
    found = judge_outputs(asked, outputs, sources, sources)
    assert found["failed"].tolist() == [False, True]
    assert found["accuracy"].iloc[0] == 1.0
    assert np.isnan(found["accuracy"].iloc[1])


def test_the_full_cache_comes_first_and_answers_for_every_protocol() -> None:
    cell = {"task": "t", "kind": "method", "policy": "m", "budget": "1/8", "source": "r0", "entries": 4}
    sane = {**cell, "kind": "full", "policy": ALL_KEPT, "budget": "1"}
    cells = pd.DataFrame([{**c, "protocol": p, "key": f"{c['policy']}{p}"} for c in (cell, sane) for p in ("v", "h")])
    asked = asked_of(cells, ["r0"], task="t", temperature=0.0, repeats=1, forced=False)
    assert asked["policy"].tolist() == [FULL_CACHE, "m", "m", ALL_KEPT, ALL_KEPT]
    assert asked["key"].isna().tolist() == [True, False, False, False, False]
    warm = asked_of(cells, ["r0"], task="t", temperature=0.7, repeats=2, forced=False)
    assert len(warm) == 2 * 3  # sampling would part the sanity row's tokens
    assert warm["rid"].is_unique
    judged = with_full(warm.assign(accuracy=[0.0, 1.0, 0.5, 1.0, 0.0, 0.5]), ["v", "h"])
    found = over_repeats(judged, OUTCOMES).set_index(["policy", "protocol"])["accuracy"]
    assert found[(FULL_CACHE, "v")] == found[(FULL_CACHE, "h")] == 0.5
    assert found[("m", "v")] == 0.5


def test_a_request_that_was_served_with_another_set_is_noticed() -> None:
    asked = pd.DataFrame({"rid": ["q0", "q1"], "policy": "m", "key": [None, "s1"], "entries": [-1, 6]})
    outputs = pd.DataFrame({"rid": ["q0", "q1"], "evict": [None, "s1"], "kept": [None, [4, 2]]})
    assert check_served(asked, outputs) == 1
    for wrong in ({"kept": [None, [4, 3]]}, {"evict": [None, "s2"]}, {"kept": [[1, 1], [4, 2]]}):
        with pytest.raises(ProbeError, match="was served with"):
            check_served(asked, outputs.assign(**wrong))
