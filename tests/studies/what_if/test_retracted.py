"""When a retracted request lets go of its entries in a replay: what a run tells of it, and what SGLang does then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest

from sglang_probe.studies.what_if.replay import Cache
from sglang_probe.studies.what_if.schedule import Computed, leaving

Key = tuple[str, int]


def tree(*events: tuple[int, int, str, str | None, int]) -> pd.DataFrame:
    frame = pd.DataFrame(events, columns=["order", "at_forward", "event", "rid", "attempt"])
    return pd.concat([pd.DataFrame([(0, 0, "opened", None, 0)], columns=frame.columns), frame], ignore_index=True)


def computing(forwards: dict[int, Sequence[Key]]) -> dict[int, list[Computed]]:
    return {forward: [(key, 9, False) for key in keys] for forward, keys in forwards.items()}


A0, A1, B0, B1, C0 = ("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0)


def test_prefills_of_others_pass_before_a_retracted_request_lets_go() -> None:
    """The cause of most differences once: it was let go of at the next forward, whatever that was."""
    events = tree(
        (1, 0, "matched", "a", 0),
        (2, 1, "matched", "c", 0),
        (3, 2, "published", "a", 0),
        (4, 4, "matched", "a", 1),
    )
    done = leaving(events, computing({0: [A0], 1: [C0], 2: [C0], 3: [C0], 4: [A1]}), decodes=[3], retractions={"a": 1})
    assert done["before", 3] == [A0]


def test_a_retracted_request_that_is_aborted_while_it_waits_let_go_of_its_entries_when_it_was_retracted() -> None:
    events = tree((1, 0, "matched", "a", 0), (2, 1, "matched", "c", 0), (3, 2, "published", "a", 0))
    done = leaving(events, computing({0: [A0], 1: [C0], 2: [C0]}), decodes=[2], retractions={"a": 1})
    assert done["before", 2] == [A0]


def test_a_pause_retracts_all_at_once_in_the_order_of_the_batch() -> None:
    """No decode lies between: they are let go of before the tree is next asked for anybody, which is first for c."""
    events = tree(
        (1, 0, "matched", "a", 0),
        (2, 0, "matched", "b", 0),
        (3, 3, "matched", "c", 0),
        (4, 3, "matched", "a", 1),
        (5, 4, "matched", "b", 1),
    )
    order = int(events.loc[events["order"] == 3, "order"].iloc[0]) + (1 << 40)
    done = leaving(
        events, computing({0: [B0, A0], 1: [B0, A0], 3: [C0, A1], 4: [B1]}), decodes=[1], retractions={"a": 1, "b": 1}
    )
    assert done["pause", order] == [B0, A0]


def test_a_run_in_which_an_attempt_begins_before_the_one_before_it_ends_does_not_hang_the_replay() -> None:
    """No SGLang does that; a run that was put together may say it."""
    events = tree((1, 0, "matched", "a", 0), (2, 1, "matched", "a", 1))
    done = leaving(events, computing({0: [A0], 1: [A1], 2: [A0]}), decodes=[], retractions={"a": 1})
    assert done["forward", 2] == [A0]


def test_an_attempt_that_another_follows_was_retracted_also_if_the_request_never_ended() -> None:
    events = tree((1, 0, "matched", "a", 0), (2, 3, "matched", "a", 1))
    done = leaving(events, computing({0: [A0], 1: [C0], 2: [C0], 3: [A1]}), decodes=[2], retractions={})
    assert done["before", 2] == [A0]


class Asked:
    """A tree of pages that notes how much room it is asked for."""

    def __init__(self, page: int, given: int = 0) -> None:
        self.page, self.given, self.room = page, given, []  # type: ignore[var-annotated]

    def match(self, ids: Any, limit: int, space: Any) -> tuple[int, None]:
        return min(self.given, limit), None

    def slots(self, node: Any) -> Any:
        import torch

        return torch.zeros(self.given, dtype=torch.int64)

    def take(self, n: int) -> Any:
        import torch

        return torch.zeros(n, dtype=torch.int64)

    def lock(self, node: Any) -> None: ...

    def make_room(self, tokens: int) -> None:
        self.room.append(tokens)


def room(page: int) -> list[int]:
    asked = Asked(page)
    cache = Cache(asked)  # type: ignore[arg-type]
    for key in (A0, B0):
        cache.match(key, [], 0, None)
    cache.compute([(A0, 10, False)])
    cache.compute([(A0, 11, True), (B0, 5, False)])
    cache.check_step([A0, B0])
    return asked.room


def test_a_mixed_forward_asks_for_its_prefill_first_and_for_its_steps_then() -> None:
    assert room(1) == [10, 5, 1, 2]


def test_with_pages_every_request_asks_for_one_more_and_a_check_for_those_that_begin_one() -> None:
    assert room(8) == [10 + 8, 5 + 8, 8, 0]


@pytest.mark.parametrize(("page", "wanted"), [(1, [10]), (8, [10 + 8])])
def test_what_is_reused_beyond_what_the_engine_had_takes_no_room_from_others(page: int, wanted: list[int]) -> None:
    """Under other settings: a chunk of `a` that is now reused must not count against what `b` needs."""
    asked = Asked(page)
    cache = Cache(asked)  # type: ignore[arg-type]
    asked.given = 100
    cache.match(A0, [], 100, None)
    asked.given = 0
    cache.match(B0, [], 100, None)
    cache.compute([(A0, 64, False), (B0, 10, False)])
    assert asked.room == wanted
