"""What differs between two prompts is named."""

from __future__ import annotations

import pytest

from sglang_probe.studies.why.differ import Difference, compare

RULES = "Answer in short sentences. Name the file and the line. Do not guess."
ONE = '{"name": "read_file", "description": "Read one file of the project"}'
TWO = '{"name": "run_tests", "description": "Run the tests of one module"}'


def kind(theirs: str, ours: str) -> Difference:
    a, b = list(theirs.encode()), list(ours.encode())
    at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return compare(b, a, at, lambda ids: bytes(ids).decode()).kind


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        (f"Now: 2026-11-27 10:17. {RULES}", f"Now: 2026-11-27 10:18. {RULES}", Difference.TIMESTAMP),
        (f"It is Monday, {RULES}", f"It is Friday, {RULES}", Difference.TIMESTAMP),
        (f"Session 4f0c2a1b9d3e8877: {RULES}", f"Session 4f0c2a1b9d3e88ab: {RULES}", Difference.TIMESTAMP),
        (f"You help Anna. {RULES}", f"You help Bert. {RULES}", Difference.MARKER),
        (f"Tools: {ONE} {TWO} {RULES}", f"Tools: {TWO} {ONE} {RULES}", Difference.ORDER),
        (f"One. {RULES}", f"Two. {'Something else altogether. ' * 5}{RULES}", Difference.TEXT),
        (f"One. {RULES}", "Two, and nothing that was there before.", Difference.TEXT),
    ],
)
def test_what_differs_is_named(theirs: str, ours: str, expected: Difference) -> None:
    assert kind(theirs, ours) == expected


def test_what_came_there_and_here_is_told() -> None:
    theirs, ours = list(b"at 10:17, " + RULES.encode()), list(b"at 10:18, " + RULES.encode())
    found = compare(ours, theirs, 7, lambda ids: bytes(ids).decode())
    assert (found.at, bytes(found.theirs), bytes(found.ours)) == (7, b"7", b"8")


def test_without_a_tokenizer_a_time_is_a_changed_stretch() -> None:
    theirs, ours = list(b"at 10:17, " + RULES.encode()), list(b"at 10:18, " + RULES.encode())
    assert compare(ours, theirs, 7, None).kind == Difference.MARKER
