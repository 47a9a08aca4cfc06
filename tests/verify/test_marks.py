"""A prefill chunk that an intervention cuts in two is one chunk of one forward."""

from __future__ import annotations

import pandas as pd

from sglang_probe.verify.frames import joined_at_marks

COLUMNS = ["rid", "attempt", "start", "end", "status", "forward_id", "chunk", "intervention"]


def frame(*spans: tuple[object, ...]) -> pd.DataFrame:
    return pd.DataFrame(list(spans), columns=COLUMNS)


def test_the_cut_at_a_mark_is_undone_and_no_other() -> None:
    found = joined_at_marks(
        frame(
            ("a", 0, 0, 4, "computed", 1, 0, None),
            ("a", 0, 4, 9, "computed", 1, 0, "m"),  # the cut
            ("a", 0, 9, 12, "computed", 2, 1, "m"),  # the next chunk
            ("a", 0, 12, 15, "computed", 3, -1, "m"),  # decode
            ("b", 0, 0, 4, "reused", 1, 0, None),
            ("b", 0, 4, 6, "reused", 1, 0, "m"),
            ("c", 0, 0, 4, "computed", 1, 0, None),
            ("c", 0, 5, 6, "computed", 1, 0, "m"),  # a gap, which another check names
            ("d", 0, 0, 4, "computed", 1, 0, None),
            ("d", 0, 4, 6, "computed", 2, 1, "m"),  # the mark begins with a chunk
            ("e", 0, 0, 4, "computed", 1, 0, "m"),
            ("e", 0, 4, 6, "computed", 1, 0, "n"),  # no cut that an onset makes
        )
    )
    assert list(zip(found["rid"], found["start"], found["end"], strict=True)) == [
        ("a", 0, 9),
        ("a", 9, 12),
        ("a", 12, 15),
        ("b", 0, 4),
        ("b", 4, 6),
        ("c", 0, 4),
        ("c", 5, 6),
        ("d", 0, 4),
        ("d", 4, 6),
        ("e", 0, 4),
        ("e", 4, 6),
    ]


def test_spans_without_marks_are_as_they_were() -> None:
    spans = frame(("a", 0, 0, 4, "computed", 1, 0, None), ("a", 0, 4, 9, "computed", 1, 0, None))
    assert joined_at_marks(spans).equals(spans)
