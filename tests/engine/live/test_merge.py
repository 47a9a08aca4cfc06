"""One answer for several data-parallel ranks."""

from __future__ import annotations

from typing import Any

from sglang_probe.engine.live.merge import merge_states


def _state(recording: bool = True, **fields: Any) -> dict[str, Any]:
    return {"recording": recording, "reason": None if recording else "the disk", **fields}


def test_one_rank_is_returned_as_it_is() -> None:
    state = _state(segment={"path": "s"}, requests=3)
    assert merge_states([state]) == state


def test_counts_are_added_and_the_latest_requests_come_first() -> None:
    a = _state(requests=3, positions={"computed": 5, "reused": 1}, recent=[{"rid": "a", "ended": 1.0}])
    b = _state(requests=4, positions={"computed": 2}, recent=[{"rid": "b", "ended": 2.0}])
    merged = merge_states([a, b])
    assert (merged["requests"], merged["positions"]) == (7, {"computed": 7, "reused": 1})
    assert [(r["rid"], r["dp_rank"]) for r in merged["recent"]] == [("b", 1), ("a", 0)]
    assert [rank["requests"] for rank in merged["ranks"]] == [3, 4]


def test_a_rank_that_stopped_is_not_hidden_by_the_others() -> None:
    merged = merge_states([_state(requests=1), _state(recording=False)])
    assert (merged["recording"], merged["reason"]) == (False, "the disk")
