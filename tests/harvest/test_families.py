"""Which requests stay on one engine, and who serves which."""

from __future__ import annotations

import random
from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from sglang_probe.ask import Ask
from sglang_probe.harvest.families import (
    Cut,
    Family,
    FamilyQueue,
    families_of,
    perhaps_in_flight,
    ready,
    turns_by_families,
    turns_of,
)
from sglang_probe.harvest.in_flight import Asked, Turn
from sglang_probe.steer_ask import Steer


def _requests(*prompts: list[int]) -> list[Asked]:
    return [(f"r{i}", prompt, {"max_new_tokens": 0}) for i, prompt in enumerate(prompts)]


def _rids(families: list[Family]) -> list[list[str]]:
    return [[rid for rid, _, _ in family.requests] for family in families]


def test_requests_that_begin_alike_are_one_family_in_workload_order() -> None:
    found, cuts = families_of(_requests([1, 2, 3], [7, 8], [1, 2, 9], [7, 9], [5]), page_size=1, engines=1)
    assert _rids(found) == [["r0", "r2"], ["r1", "r3"], ["r4"]]
    assert cuts == []


def test_what_is_shared_is_whole_pages() -> None:
    requests = _requests([1, 2, 3, 4], [1, 2, 9, 9], [5, 5, 5, 5], [5, 5, 5, 6])
    assert _rids(families_of(requests, page_size=2, engines=2)[0]) == [["r0", "r1"], ["r2", "r3"]]
    assert _rids(families_of(requests, page_size=4, engines=2)[0]) == [["r0"], ["r1"], ["r2"], ["r3"]]


def test_a_family_of_more_than_its_share_is_cut_where_it_parts_and_no_further() -> None:
    """All begin with 1, 1: half of them go on with 2, half with 3."""
    requests = _requests([1, 1, 2, 4], [1, 1, 3, 4], [1, 1, 2, 5], [1, 1, 3, 5])
    found, cuts = families_of(requests, page_size=1, engines=2)
    assert _rids(found) == [["r0", "r2"], ["r1", "r3"]]
    assert cuts == [Cut(positions=2, pieces=2)]
    assert _rids(families_of(requests, page_size=1, engines=1)[0]) == [["r0", "r1", "r2", "r3"]]


def test_generated_tokens_are_work_too() -> None:
    long = [(f"r{i}", [1, i], {"max_new_tokens": 100}) for i in range(2)]
    found, cuts = families_of([*long, ("r2", [2] * 50, {"max_new_tokens": 0})], page_size=1, engines=2)
    assert _rids(found) == [["r0"], ["r1"], ["r2"]]
    assert cuts == [Cut(1, 2)]


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=0, max_size=24)


@given(PROMPTS, st.integers(1, 3), st.integers(1, 4))
def test_every_request_is_in_one_family_and_families_share_what_was_cut_at_most(
    prompts: list[list[int]], page_size: int, engines: int
) -> None:
    requests = _requests(*prompts)
    families, cuts = families_of(requests, page_size=page_size, engines=engines)
    rids = _rids(families)
    assert sorted(rid for family in rids for rid in family) == sorted(rid for rid, _, _ in requests)
    fair = sum(f.tokens for f in families) / engines
    assert all(f.tokens <= fair or len(f.requests) == 1 for f in families)
    deepest = max((c.positions for c in cuts), default=0)
    for i, one in enumerate(families):
        for other in families[i + 1 :]:
            for _, a, _ in one.requests:
                for _, b, _ in other.requests:
                    same = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                    assert same // page_size * page_size <= deepest


def _families(*tokens: int) -> list[Family]:
    return [Family(((f"f{i}", [], {}),), n) for i, n in enumerate(tokens)]


def test_the_work_is_shared_out_evenly_and_each_engine_keeps_the_order() -> None:
    queue = FamilyQueue(_families(1, 2, 3, 4, 5, 5), 2)
    mine = [queue.take(e) for e in (0, 0, 0, 1, 1, 1)]
    assert [f.tokens for f in mine if f] == [1, 4, 5, 2, 3, 5]
    assert queue.stolen == 0
    assert not queue.waiting


def test_an_engine_without_work_takes_the_last_family_of_the_fullest_queue() -> None:
    queue = FamilyQueue(_families(4, 4, 4, 4, 4, 4), 3)
    assert [queue.take(0).requests[0][0] for _ in range(4)] == ["f0", "f3", "f4", "f5"]  # type: ignore[union-attr]
    assert queue.stolen == 2
    assert [queue.take(e).requests[0][0] for e in (1, 2)] == ["f1", "f2"]  # type: ignore[union-attr]
    assert queue.take(1) is None


def test_what_is_given_back_comes_next_and_can_be_taken_by_another() -> None:
    queue = FamilyQueue(_families(3, 3), 2)
    taken = queue.take(0)
    assert taken is not None
    queue.give_back(0, taken)
    assert queue.take(1) is not None
    assert queue.take(1) == taken


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 5), st.integers(0, 99))
def test_every_family_is_served_once_whoever_asks_when(tokens: list[int], engines: int, seed: int) -> None:
    queue, random_ = FamilyQueue(_families(*tokens), engines), random.Random(seed)
    seen = []
    while (family := queue.take(random_.randrange(engines))) is not None:
        seen.append(family.requests[0][0])
    assert sorted(seen) == sorted(f"f{i}" for i in range(len(tokens)))


def test_siblings_are_kept_as_far_apart_as_one_engine_keeps_them() -> None:
    """Two families in turn, then one that comes in a row; two in flight."""
    requests = _requests([1, 1], [2, 1], [1, 2], [2, 2], [3, 1], [3, 2], [3, 3])
    families, _ = families_of(requests, page_size=1, engines=1)
    turns = turns_of(requests, families, 2)
    assert {rid: turn.after for rid, turn in turns.items()} == {
        **{"r0": None, "r1": None, "r2": "r0", "r3": "r1"},
        **{"r4": None, "r5": None, "r6": "r4"},
    }
    assert ready([rid for rid, _, _ in reversed(requests)], turns) == ["r0", "r1", "r4", "r5"]
    assert ready(["r3~1", "r2~1"], turns) == ["r2~1", "r3~1"], "those before them were answered"
    alone = turns_of(requests, families, 1)
    assert ready([rid for rid, _, _ in requests], alone) == ["r0", "r1", "r4"]


def test_an_engine_that_has_enough_to_do_takes_nothing_of_others() -> None:
    queue = FamilyQueue(_families(4, 4), 2)
    assert queue.take(0, steal=False) is not None
    assert queue.take(0, steal=False) is None
    assert queue.take(0) is not None
    assert (queue.stolen, queue.waiting) == (1, False)


def _long(*prompts: str) -> list[Asked]:
    """Every letter stands for 32 tokens."""
    return [(f"r{i}", [ord(c) for c in p for _ in range(32)], {}) for i, p in enumerate(prompts)]


def _after(requests: list[Asked], page_size: int = 1) -> dict[str, str | None]:
    return {rid: turn.after for rid, turn in turns_by_families(requests, page_size=page_size).items()}


def test_a_request_waits_for_the_first_one_that_begins_with_all_that_it_shares() -> None:
    """Not for a sibling that waits itself, and not for one that shares less."""
    found = _after(_long("abc", "abd", "abe", "axy", "axz", "q"))
    assert found == {"r0": None, "r1": "r0", "r2": "r0", "r3": "r0", "r4": "r3", "r5": None}


def test_too_little_that_is_shared_is_not_waited_for() -> None:
    requests = _long("ab", "ac")
    assert _after(requests)["r1"] == "r0"
    assert _after(requests, page_size=64)["r1"] is None
    requests[1][1][31] = 0  # type: ignore[index]
    assert _after(requests)["r1"] is None


def test_a_request_that_publishes_or_reuses_nothing_is_in_no_family() -> None:
    a, b, c, d = _long("ab", "ac", "ad", "ae")
    alone = Ask(cache="off").into({})
    steered = Ask(steer=(Steer(vector="joy", strength=2.0),)).into({})
    found = _after([(a[0], a[1], alone), b, (c[0], c[1], steered), (d[0], d[1], steered)])
    assert found == {"r0": None, "r1": None, "r2": None, "r3": "r2"}


@given(st.lists(st.text("ab", min_size=1, max_size=5), max_size=20))
def test_whoever_is_waited_for_shares_most_and_is_the_first_to(words: list[str]) -> None:
    requests = _long(*words)

    def shared(i: int, j: int) -> int:
        return 32 * sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(words[i], words[j], strict=False)))

    for i, after in enumerate(_after(requests).values()):
        most = max((shared(i, j) for j in range(i)), default=0)
        assert after == (None if most < 32 else f"r{next(j for j in range(i) if shared(i, j) == most)}")


def test_whoever_was_sent_at_a_first_token_may_have_been_in_flight() -> None:
    turns = {"a": Turn(0), "b": Turn(1, "a", begun=True), "c": Turn(2, "b", begun=True), "d": Turn(3, "a")}
    assert perhaps_in_flight(["a", "b", "c", "d"], turns, 16) == ["a", "b", "c"]
    assert perhaps_in_flight(["a", "b", "c", "d"], turns, 1) == ["a", "b"]
