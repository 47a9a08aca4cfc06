"""The cells of the factorial: what is said and where."""

from __future__ import annotations

import pandas as pd
import pytest

from sglang_probe.studies.factorial import cells
from sglang_probe.studies.factorial.distances import curves


def test_every_content_stands_at_every_position() -> None:
    found = cells.all_cells()
    assert len(set(found)) == len(found) == len(cells.CONTENTS) * len(cells.POSITIONS)
    assert len({c.rid("r000001") for c in found}) == len(found)


def test_positions_are_those_of_the_continuation_shifted_or_from_zero() -> None:
    starts = {p: cells.Cell(cells.REAL, p).start(100) for p in cells.POSITIONS}
    assert starts == {"true": 100, "+1": 101, "+8": 108, "+32": 132, "+128": 228, "zero": 0}


def test_contents_are_as_long_as_asked() -> None:
    prompt = list(range(50))
    assert cells.prompt_ends(prompt, 6, 2) == [0, 1, 46, 47, 48, 49]
    assert cells.prompt_ends(prompt, 3, 8) == [0, 1, 2]
    assert cells.later(range(20), 5) == [8, 9, 10, 11, 12]
    assert cells.later(range(9), 8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert cells.repeated([7, 8, 9], 5) == [7, 8, 9, 7, 8]
    drawn = cells.random_tokens([3, 4, 5], 20, "a")
    assert drawn == cells.random_tokens([3, 4, 5], 20, "a") != cells.random_tokens([3, 4, 5], 20, "b")
    assert set(drawn) <= {3, 4, 5}


def test_outcomes_are_ordered_by_how_far_the_queries_are_and_each_curve_moves_one_thing() -> None:
    """Queries at a distance of 0.1 for each step of content and 0.02 for each of position; mass falls by distance."""
    rows = []
    for i, content in enumerate(reversed(cells.CONTENTS)):  # the order of the names says nothing
        for j, position in enumerate(cells.POSITIONS):
            far = 0.1 * (len(cells.CONTENTS) - 1 - i if content != cells.REAL else 0) + 0.02 * j
            row = {"layer": "all", "content": content, "position": position}
            rows += [{**row, "outcome": "post", "value": 1 - far}, {**row, "outcome": "mass@0.25", "value": 0.9 - far}]
    rows.append({"layer": "all", "content": "baseline", "position": "window", "outcome": "mass@0.25", "value": 0.5})
    found = curves(pd.DataFrame(rows).assign(value_low=0.0, value_high=1.0))
    assert set(found["outcome"]) == {"mass@0.25"}
    assert found["value"].to_numpy() == pytest.approx(0.9 - found["distance"].to_numpy())
    content, position = (found[found["curve"] == c] for c in ("content", "position"))
    assert content["level"].tolist() == list(cells.CONTENTS)
    assert content["distance"].is_monotonic_increasing
    assert (content["tokens"] == 0).all()
    assert position["level"].tolist() == list(cells.POSITIONS)
    assert position["tokens"].tolist()[:-1] == [0, 1, 8, 32, 128]
    assert pd.isna(position["tokens"].iloc[-1])
    assert position["distance"].to_numpy() == pytest.approx([0, 0.02, 0.04, 0.06, 0.08, 0.1])
