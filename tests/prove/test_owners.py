"""A finished run against the true owners of slots: a run that says the same passes, one that does not is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd

from sglang_probe.prove.owners import NOBODY, Owners, compare, unended
from sglang_probe.run import schema


def run(reused: list[dict[str, Any]], rebinds: list[dict[str, Any]] = ()) -> Any:
    columns = ["rid", "attempt", "start", "end", "status", "origin_rid", "origin_attempt"]
    spans = pd.DataFrame([{"attempt": 0, "status": schema.REUSED, **r} for r in reused], columns=columns)
    columns = ["rid", "attempt", "start", "end", "at_forward", "origin_rid", "origin_attempt"]
    moved = pd.DataFrame([{"attempt": 0, **r} for r in rebinds], columns=columns)
    ended = pd.DataFrame({"rid": ["a", "b~1"]})
    return SimpleNamespace(spans=lambda: spans, rebinds=lambda: moved, engine_requests=lambda: ended)


A, B = ("a", 0), ("b", 0)
TRUE = Owners(reused={B: {0: A, 1: A}}, last={A: (0, []), B: (4, [A, A, B])})
OF_A = {"rid": "b", "start": 0, "end": 2, "origin_rid": "a", "origin_attempt": 0}


def test_a_run_that_says_the_same_is_right() -> None:
    assert compare(run([OF_A]), TRUE) == (5, None)


def test_another_origin_is_named() -> None:
    _, wrong = compare(run([{**OF_A, "origin_rid": "c"}]), TRUE)
    assert wrong is not None
    assert "('b', 0) position 0" in wrong


def test_a_reuse_that_is_not_written_is_named() -> None:
    assert "position 1" in str(compare(run([{**OF_A, "end": 1}]), TRUE)[1])


def test_an_unknown_origin_is_nobody() -> None:
    assert (
        compare(run([{**OF_A, "origin_rid": None}]), Owners(reused={B: {0: NOBODY, 1: NOBODY}}, last={B: (0, [])}))[1]
        is None
    )


def test_rebinds_lead_to_the_last_owners() -> None:
    moved = {"rid": "b", "start": 2, "end": 3, "at_forward": 3, "origin_rid": "a", "origin_attempt": 0}
    true = Owners(reused=TRUE.reused, last={B: (4, [A, A, A])})
    assert compare(run([OF_A], [moved]), true)[1] is None
    assert "position 2 at forward 4" in str(compare(run([OF_A]), true)[1])
    assert "position 2 at forward 4" in str(compare(run([OF_A], [{**moved, "at_forward": 5}]), true)[1])


def test_a_request_without_an_end_is_named() -> None:
    assert unended(run([]), ["a", "b", "c"]) == ["c"]
