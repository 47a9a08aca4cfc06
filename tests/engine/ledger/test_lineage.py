"""Owners of KV entries, on the smallest trees in which each rule matters."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_probe.engine.ledger.lineage import Lineage
from sglang_probe.errors import LedgerError

A = np.arange(100, 164)
B = np.concatenate([A[:32], np.arange(500, 532)])  # shares 32 tokens with A


def owners(lineage: Lineage, rid: str) -> list[tuple[int, int, str | None, int]]:
    return [(o.start, o.end, o.rid, o.attempt) for o in lineage.owners(rid)]


@pytest.mark.parametrize("page", [1, 16])
def test_a_shared_prefix_belongs_to_who_computed_it(page: int) -> None:
    lineage = Lineage(page, 1000)
    lineage.launch("a", 0, 0, 64, A, None)
    lineage.publish("a", A, 64, 0, 0, None)
    reused = lineage.launch("b", 0, 32, 64, B, None)
    assert [(o.start, o.end, o.rid) for o in reused] == [(0, 32, "a")]
    assert owners(lineage, "b") == [(0, 32, "a", 0), (32, 64, "b", 0)]


def test_another_namespace_shares_nothing() -> None:
    lineage = Lineage(1, 1000)
    lineage.launch("a", 0, 0, 64, A, ("x", None))
    lineage.publish("a", A, 64, 0, 0, ("x", None))
    assert [o.rid for o in lineage.launch("b", 0, 32, 64, B, ("y", None))] == [None]


def test_a_request_repointed_to_the_tree_changes_owner_and_passes_it_on() -> None:
    """`b` computes the shared prefix itself, then the tree repoints it to `a`; `c` reuses both."""
    lineage = Lineage(1, 1000)
    lineage.launch("a", 0, 0, 64, A, None)
    lineage.launch("b", 0, 0, 64, B, None)
    lineage.publish("a", A, 64, 0, 0, None)
    rebound = lineage.publish("b", B, 64, 32, 0, None)
    assert [(o.start, o.end, o.rid) for o in rebound] == [(0, 32, "a")]
    assert owners(lineage, "b") == [(0, 32, "a", 0), (32, 64, "b", 0)]
    lineage.end("a")
    lineage.end("b")
    assert [(o.start, o.end, o.rid) for o in lineage.launch("c", 0, 60, 64, B, None)] == [(0, 32, "a"), (32, 60, "b")]


@pytest.mark.parametrize("page", [1, 16])
def test_entries_that_the_tree_takes_in_the_place_of_its_own_belong_to_who_brought_them(page: int) -> None:
    """`b` computed all of `a`'s prefix too. The tree keeps `a`'s first page, takes `b`'s second and keeps the rest."""
    lineage = Lineage(page, 1000)
    lineage.launch("a", 0, 0, 64, A, None)
    lineage.launch("b", 0, 0, 64, A, None)
    lineage.publish("a", A, 64, 0, 0, None)
    rebound = lineage.publish("b", A, 64, 64, 0, None, [(16, 32)])
    assert [(o.start, o.end, o.rid) for o in rebound] == [(0, 16, "a"), (32, 64, "a")]
    assert owners(lineage, "b") == [(0, 16, "a", 0), (16, 32, "b", 0), (32, 64, "a", 0)]
    assert [(o.start, o.end, o.rid) for o in lineage.launch("c", 0, 48, 64, A, None)] == [
        (0, 16, "a"),
        (16, 32, "b"),
        (32, 48, "a"),
    ]


def test_entries_taken_of_somebody_unknown_are_nobodys() -> None:
    lineage = Lineage(1, 1000)
    lineage.launch("a", 0, 0, 64, A, None)
    lineage.publish("a", A, 64, 0, 0, None)
    lineage.publish("", A, 64, 64, 0, None, [(16, 32)])
    reused = lineage.launch("c", 0, 48, 64, A, None)
    assert [(o.start, o.end, o.rid) for o in reused] == [(0, 16, "a"), (16, 32, None), (32, 48, "a")]


def test_being_repointed_to_ones_own_entry_is_no_rebind() -> None:
    lineage = Lineage(1, 1000)
    lineage.launch("a", 0, 0, 32, A, None)
    lineage.publish("a", A, 32, 0, 0, None)
    lineage.launch("a", 0, 32, 64, A, None)
    assert lineage.publish("a", A, 64, 32, 32, None) == []


def test_decoded_positions_are_the_requests_own_without_being_launched() -> None:
    lineage = Lineage(1, 1000)
    lineage.launch("a", 0, 0, 32, A, None)
    lineage.publish("a", A, 32, 0, 0, None)
    lineage.publish("a", A, 64, 32, 32, None)  # the request ended after 32 decode steps
    lineage.end("a")
    assert [(o.start, o.end, o.rid) for o in lineage.launch("b", 0, 63, 64, A, None)] == [(0, 63, "a")]


def test_a_prefix_inserted_again_after_its_eviction_belongs_to_the_second() -> None:
    lineage = Lineage(1, 1000)
    lineage.launch("a", 0, 0, 64, A, None)
    lineage.publish("a", A, 64, 0, 0, None)
    lineage.end("a")
    lineage.launch("b", 0, 0, 64, A, None)  # evicted: nothing was matched
    lineage.publish("b", A, 64, 0, 0, None)
    assert [o.rid for o in lineage.launch("c", 0, 63, 64, A, None)] == ["b"]


def test_a_second_attempt_is_an_owner_of_its_own() -> None:
    lineage = Lineage(1, 1000)
    lineage.launch("a", 0, 0, 64, A, None)
    lineage.launch("a", 1, 0, 64, A, None)
    lineage.publish("a", A, 64, 0, 0, None)
    assert [(o.rid, o.attempt) for o in lineage.launch("b", 0, 63, 64, A, None)] == [("a", 1)]


def test_the_tail_of_an_unfilled_page_is_not_published() -> None:
    lineage = Lineage(16, 1000)
    lineage.launch("a", 0, 0, 40, A, None)
    lineage.publish("a", A, 32, 0, 0, None)
    with pytest.raises(LedgerError, match="whole pages"):
        lineage.launch("b", 0, 40, 64, A[:40], None)
    lineage.launch("c", 0, 48, 64, A, None)
    assert owners(lineage, "c") == [(0, 32, "a", 0), (32, 48, None, -1), (48, 64, "c", 0)]


def test_after_a_flush_nothing_is_known() -> None:
    lineage = Lineage(1, 1000)
    lineage.launch("a", 0, 0, 64, A, None)
    lineage.publish("a", A, 64, 0, 0, None)
    lineage.forget_tree()
    assert [o.rid for o in lineage.launch("b", 0, 63, 64, A, None)] == [None]


def test_memory_is_bounded_and_what_is_in_use_is_kept() -> None:
    lineage = Lineage(1, 1024)
    lineage.launch("a", 0, 0, 64, A, None)
    lineage.publish("a", A, 64, 0, 0, None)
    rng = np.random.default_rng(0)
    for i in range(100):
        fresh = rng.integers(1000, 2000, 256)
        lineage.launch(f"f{i}", 0, 0, 256, fresh, None)
        lineage.publish(f"f{i}", fresh, 256, 0, 0, None)
        lineage.end(f"f{i}")
        if i < 50:
            assert [o.rid for o in lineage.launch(f"u{i}", 0, 63, 64, A, None)] == ["a"]
    assert len(lineage._young) + len(lineage._old) <= 2 * (1024 + 256)
    assert [o.rid for o in lineage.launch("late", 0, 63, 64, A, None)] == [None], "forgotten is unknown, never wrong"


def test_names_are_forgotten_with_the_entries_they_own() -> None:
    """A server that runs for months must not keep the name of every request."""
    lineage = Lineage(1, 1024)
    for i in range(3000):
        tokens = np.array([i, i + 1, i + 2, i + 3])
        lineage.launch(f"r{i}", 0, 0, 4, tokens, None)
        lineage.publish(f"r{i}", tokens, 4, 0, 0, None)
        lineage.end(f"r{i}")
    assert len(lineage._names._young) + len(lineage._names._old) < 600
    for i in range(3000):  # computes nothing that the tree takes
        lineage.launch(f"s{i}", 0, 0, 4, tokens, None)
        lineage.publish(f"s{i}", tokens, 4, 4, 0, None)
        lineage.end(f"s{i}")
    assert len(lineage._names._young) + len(lineage._names._old) < 600
    assert [o.rid for o in lineage.launch("x", 0, 3, 4, tokens, None)] == ["r2999"]


def test_a_name_lives_as_long_as_its_entry_is_reused() -> None:
    lineage = Lineage(1, 1024)
    lineage.launch("a", 0, 0, 64, A, None)
    lineage.publish("a", A, 64, 0, 0, None)
    lineage.end("a")
    for i in range(3000):
        tokens = np.array([1000 + i, i + 1, i + 2, i + 3])
        lineage.launch(f"r{i}", 0, 0, 4, tokens, None)
        lineage.publish(f"r{i}", tokens, 4, 0, 0, None)
        lineage.end(f"r{i}")
        if i % 100 == 0:
            assert [o.rid for o in lineage.launch(f"b{i}", 0, 32, 64, B, None)] == ["a"]
            lineage.end(f"b{i}")
