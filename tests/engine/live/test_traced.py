"""What is added up for a span: the ledger's spans, and of forward passes in flight what the ledger will have."""

from __future__ import annotations

import pytest

from sglang_probe.engine.ledger.facts import ForwardPlan, Under
from sglang_probe.engine.ledger.lineage import Origin
from sglang_probe.engine.live.traced import Traced

WANTED = {
    "sglang_probe.attempt": 0,
    "sglang_probe.tokens.reused": 6,
    "sglang_probe.tokens.computed": 4,
    "sglang_probe.tokens.recomputed": 0,
    "sglang_probe.tokens.decoded": 1,
    "sglang_probe.tokens.reused_from_before": 2,
    "sglang_probe.origins.count": 2,
    "sglang_probe.origins.first": "a",
    "sglang_probe.forwards.first": 7,
    "sglang_probe.forwards.last": 8,
    "sglang_probe.steering": "s",
}


def prefill() -> ForwardPlan:
    origins = [Origin(0, 2, None, 0), Origin(2, 5, "a", 0), Origin(5, 6, "b", 1)]
    return plan(7, 6, 10, decoding=False, origins={0: origins}, under={0: Under("s", 8, 10, "{}")})


def plan(forward: int, start: int, end: int, *, decoding: bool, **more: object) -> ForwardPlan:
    kept = ForwardPlan(0, "extend", ["r"], [start], [end], [decoding], [0], [10], [None], end - start)
    kept.forward_id = forward
    for name, value in more.items():
        setattr(kept, name, value)
    return kept


def test_what_is_in_flight_counts_as_the_ledger_will_count_it() -> None:
    flight = [prefill(), plan(8, 10, 11, decoding=True)]
    first = Traced().with_flight(flight[:1], "r", finishing=True)
    assert first.with_flight(flight[1:], "r", finishing=True).attributes() == WANTED


@pytest.mark.parametrize("finishing", [True, False])
def test_a_step_that_will_be_discarded_is_not_counted(finishing: bool) -> None:
    """Of a request that finishes, the step after the last; of one that is dropped, every step in flight."""
    flight = [prefill(), plan(8, 10, 11, decoding=True)]
    told = Traced().with_flight(flight, "r", finishing=finishing).attributes()
    assert told["sglang_probe.tokens.decoded"] == 0
    assert told["sglang_probe.tokens.computed"] == 4
    assert told["sglang_probe.forwards.last"] == 7


def test_asking_changes_nothing() -> None:
    so_far = Traced()
    so_far.with_flight([prefill()], "r", finishing=True)
    assert so_far == Traced()


def test_a_discarded_step_and_positions_that_nobody_asked_for_are_in_no_count() -> None:
    so_far = Traced()
    for status, phase in (("computed", "overshoot"), ("unrequested", None), ("dropped", None)):
        so_far.add(("r", 3, 0, 5, status, phase, 9, -1, None, -1, 0, None, None, None))
    assert so_far == Traced()
