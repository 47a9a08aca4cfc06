"""One answer for several data-parallel ranks, each of which records on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SUMMED = (
    "requests",
    "requests_in_flight",
    "requests_unaccounted",
    "forwards",
    "forwards_dropped",
    "rows",
    "write_errors",
    "segments_closed",
)


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of all ranks as one: counts are added up, and `ranks` holds each rank's own.

    A single state is returned as it is. The merged one is recording only if every rank is.
    """
    if len(states) == 1:
        return dict(states[0])
    positions: dict[str, int] = {}
    for state in states:
        for fate, n in state.get("positions", {}).items():
            positions[fate] = positions.get(fate, 0) + n
    recent = [{**r, "dp_rank": rank} for rank, state in enumerate(states) for r in state.get("recent", [])]
    return {
        "recording": all(state["recording"] for state in states),
        "reason": next((state["reason"] for state in states if state["reason"]), None),
        "tries_again_in": max((t for state in states if (t := state.get("tries_again_in")) is not None), default=None),
        **{name: sum(state.get(name, 0) for state in states) for name in _SUMMED},
        "positions": positions,
        "recent": sorted(recent, key=lambda r: r["ended"], reverse=True),
        "ranks": [{k: v for k, v in state.items() if k != "recent"} for state in states],
    }
