"""When a retracted request lets go of its entries in a replay: what a run tells of it, and what SGLang does then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from sglang_probe.studies.what_if.replay import Cache, Computed, _last

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
    done = _last(events, computing({0: [A0], 1: [C0], 2: [C0], 3: [C0], 4: [A1]}), decodes=[3], retractions={"a": 1})
    assert done["before", 3] == [A0]


def test_a_retracted_request_that_is_aborted_while_it_waits_let_go_of_its_entries_when_it_was_retracted() -> None:
    events = tree((1, 0, "matched", "a", 0), (2, 1, "matched", "c", 0), (3, 2, "published", "a", 0))
    done = _last(events, computing({0: [A0], 1: [C0], 2: [C0]}), decodes=[2], retractions={"a": 1})
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
    done = _last(
        events, computing({0: [B0, A0], 1: [B0, A0], 3: [C0, A1], 4: [B1]}), decodes=[1], retractions={"a": 1, "b": 1}
    )
    assert done["pause", order] == [B0, A0]


class Asked:
    """A tree of pages that notes how much room it is asked for."""

    def __init__(self, page: int) -> None:
        self.page, self.room = page, []  # type: ignore[var-annotated]

    def match(self, ids: Any, limit: int, space: Any) -> tuple[int, None]:
        return 0, None

    def slots(self, node: Any) -> Any:
        import torch

        return torch.zeros(0, dtype=torch.int64)

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
