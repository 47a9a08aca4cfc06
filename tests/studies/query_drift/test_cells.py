"""The cells of the factorial: what is said and where."""

from __future__ import annotations

from sglang_probe.studies.factorial import cells


def test_every_content_stands_at_every_position() -> None:
    found = cells.all_cells()
    assert len(set(found)) == len(found) == len(cells.CONTENTS) * len(cells.POSITIONS)
    assert len({c.rid("r000001") for c in found}) == len(found)


def test_positions_are_those_of_the_continuation_shifted_or_from_zero() -> None:
    starts = {p: cells.Cell(cells.REAL, p).start(100) for p in cells.POSITIONS}
    assert starts == {"true": 100, "+8": 108, "+32": 132, "zero": 0}


def test_contents_are_as_long_as_asked() -> None:
    prompt = list(range(50))
    assert cells.prompt_ends(prompt, 6, 2) == [0, 1, 46, 47, 48, 49]
    assert cells.prompt_ends(prompt, 3, 8) == [0, 1, 2]
    assert cells.repeated([7, 8, 9], 5) == [7, 8, 9, 7, 8]
    drawn = cells.random_tokens([3, 4, 5], 20, "a")
    assert drawn == cells.random_tokens([3, 4, 5], 20, "a") != cells.random_tokens([3, 4, 5], 20, "b")
    assert set(drawn) <= {3, 4, 5}
