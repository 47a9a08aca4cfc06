"""Which requests generate lookahead tokens, behind what, and under which kept set."""

from __future__ import annotations

from fractions import Fraction

import pytest

from sglang_probe.errors import ProbeError
from sglang_probe.eviction.protocol import Protocol
from sglang_probe.studies.evict.grid import Protection, Trivial, entries_of
from sglang_probe.studies.evict.lookahead_runs import Asked, first_pass, steps_needed
from tests.eviction.lab.test_offline import CONTEXT, batch
from tests.eviction.toy import KV_HEADS, LENGTH

TRIVIAL = Trivial(sinks=1, window=2)
PROMPTS = {f"r{b}": tuple(range(100 * b, 100 * b + LENGTH)) for b in range(3)}


def asked(methods: list, budgets: list) -> list[Asked]:
    needed = steps_needed(entries_of(methods, [], TRIVIAL, 0))
    protect = Protection(sinks=1, recent=2)
    return list(first_pass([batch()], needed, budgets, list(Protocol), protect, PROMPTS))


def test_the_most_demanding_policy_sets_the_number_of_tokens() -> None:
    methods = [{"method": "laq", "steps": 4}, {"method": "laq++", "steps": 6}, "dapq", "knorm"]
    assert steps_needed(entries_of(methods, [], TRIVIAL, 0)) == {"laq": 6, "dapq": 32}
    with pytest.raises(ProbeError, match="asks for lookahead queries `mine`"):
        steps_needed(entries_of([{"method": "laq", "queries": "mine"}], [], TRIVIAL, 0))


def test_pseudo_tokens_are_the_first_and_last_of_what_is_compressed() -> None:
    found = {(a.at, a.source): a for a in asked([{"method": "dapq", "steps": 5}], [6])}
    assert len(found) == 2 * 3  # the budget changes nothing
    visible, hidden = found[("query_visible", "dapq", ""), "r1"], found[("query_hidden", "dapq", ""), "r1"]
    assert (visible.context, visible.pseudo) == (LENGTH, (100, 101, 109, 110, 111))
    assert (hidden.context, hidden.pseudo) == (CONTEXT, (100, 101, 107, 108, 109))
    assert visible.kept is None


def test_lookahead_tokens_are_generated_under_a_cache_of_each_budget() -> None:
    found = asked([{"method": "laq", "steps": 4}, {"method": "speckv", "steps": 3}], [Fraction(1, 2), 3])
    assert {(a.at[1], a.at[2]) for a in found} == {("laq", "1/2"), ("laq", "3"), ("speckv", "1/2"), ("speckv", "3")}
    for a in found:
        length = LENGTH if a.at[0] == "query_visible" else CONTEXT
        budget = length // 2 if a.at[2] == "1/2" else 3
        assert a.kept is not None
        assert (a.context, a.kept.length) == (length, length)
        assert a.kept.counts_SYG.tolist() == [[[budget] * KV_HEADS] * 2]
        assert a.kept.keep_SYGN[..., [0, -2, -1]].all()  # what all policies of the study keep
        if a.at[1] == "speckv":
            assert a.kept.keep_SYGN[..., length - budget + 1 :].all()
    assert len({a.rid for a in found}) == len(found)
