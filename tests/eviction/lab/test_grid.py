"""Policies keep their kind and a label of their own; budgets say what they mean."""

from __future__ import annotations

import pytest

from sglang_probe.errors import ConfigError
from sglang_probe.eviction import Policy
from sglang_probe.studies.evict.grid import BASELINE, Protection, Trivial, caveats, entries_of, parse_budget, tokens_of

TRIVIAL = Trivial(sinks=1, window=2)


def test_the_baseline_protects_what_metrics_call_trivial() -> None:
    (baseline,) = entries_of([], [], TRIVIAL, seed=7)
    assert (baseline.label, baseline.kind) == (BASELINE, "baseline")
    assert baseline.policy.parameters() == {"sinks": 1, "recent": 2, "seed": 7}


def test_oracles_are_never_methods_and_cannot_be_listed_as_such() -> None:
    kinds = {e.label: e.kind for e in entries_of(["snapkv"], ["static_max"], TRIVIAL, seed=0)}
    assert kinds == {BASELINE: "baseline", "snapkv": "method", "static_max": "oracle"}
    with pytest.raises(ConfigError, match="no method `static_max`"):
        entries_of(["static_max"], [], TRIVIAL, seed=0)


def test_parameters_are_in_a_label_only_where_the_name_does_not_tell() -> None:
    given = ["keydiff", {"method": "snapkv", "window": 8}, {"method": "snapkv", "window": 16}]
    wrapped = {"method": "adakv", "base": {"method": "snapkv", "window": 8}}
    labels = [e.label for e in entries_of([*given, wrapped], [], TRIVIAL, seed=0)]
    assert labels == [BASELINE, "keydiff", "snapkv window 8", "snapkv window 16", "adakv(snapkv)"]
    with pytest.raises(ConfigError, match="two policies are called"):
        entries_of(["keydiff", "keydiff"], [], TRIVIAL, seed=0)


def test_what_a_policy_needs_and_whether_it_evicts() -> None:
    given = ["quest", {"method": "criticalkv", "base": "laq"}, "knorm"]
    found = {e.label: (e.lookahead, e.evicts) for e in entries_of(given, ["per_step"], TRIVIAL, seed=0)}
    assert found["quest"] == (None, False)
    assert found["criticalkv(laq)"] == ("laq", True)
    assert found["knorm"] == (None, True)
    assert found["per_step"] == (None, False)


EQUAL = Protection(sinks=3, recent=5)


def test_on_equal_terms_all_keep_the_studys_ends_and_methods_as_published_their_own() -> None:
    given = ["random", "keydiff", {"method": "snapkv", "window": 8}, {"method": "knorm", "sinks": 3, "recent": 5}]
    given.append({"method": "adakv", "base": {"method": "snapkv", "window": 8}})
    found = entries_of(given, ["static_max"], TRIVIAL, seed=0, protect=EQUAL, as_published=True)

    def kept(policy: Policy) -> tuple[int, int]:
        inner = getattr(policy, "base", policy)
        return inner.sinks, inner.recent

    ends = {(e.label, e.kind): kept(e.policy) for e in found}
    assert ends == {
        (BASELINE, "baseline"): (3, 5),
        ("random", "published"): (0, 0),  # with protection it would be the baseline
        ("keydiff", "method"): (3, 5),
        ("keydiff", "published"): (0, 0),
        ("snapkv", "method"): (3, 5),
        ("snapkv", "published"): (0, 8),
        ("knorm", "method"): (3, 5),  # its own set is the study's
        ("adakv(snapkv)", "method"): (3, 5),
        ("adakv(snapkv)", "published"): (0, 8),
        ("static_max", "oracle"): (3, 5),
    }
    alone = entries_of(given[1:], ["static_max"], TRIVIAL, seed=0, protect=EQUAL)
    assert [e.label for e in alone] == [e.label for e in found if e.kind not in ("published",)]
    with pytest.raises(ConfigError, match="is its baseline, protected random"):
        entries_of(given, [], TRIVIAL, seed=0, protect=EQUAL)


def test_sets_by_query_head_are_named_so_and_never_reach_the_engine() -> None:
    given = [{"method": "snapkv", "window": 8}, {"method": "snapkv", "window": 8, "per_query_head": True}]
    found = entries_of(given, [], TRIVIAL, seed=0)
    assert [(e.label, e.evicts) for e in found[1:]] == [
        ("snapkv window 8", True),
        ("snapkv window 8, per query head", False),
    ]
    assert found[1].policy == found[2].policy
    (said,) = caveats(found, 32)
    assert "`snapkv window 8, per query head`: a kept set for every query head" in said
    with pytest.raises(ConfigError, match="`per_query_head` is true or false"):
        entries_of([{"method": "snapkv", "per_query_head": 2}], [], TRIVIAL, seed=0)


@pytest.mark.parametrize(
    ("given", "length", "tokens"),
    [("1/8", 228, 29), ("1/16", 226, 14), (64, 228, 64), ("64", 228, 64), (0.5, 9, 5), ("1/2", 228, 114), (1, 228, 1)],
)
def test_a_share_is_rounded_and_a_number_is_itself(given: object, length: int, tokens: int) -> None:
    assert tokens_of(parse_budget(given), length) == tokens


@pytest.mark.parametrize("given", ["much", 0, -3, "3/2", True, "1/0"])
def test_what_is_no_budget_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match="a budget is"):
        parse_budget(given)
