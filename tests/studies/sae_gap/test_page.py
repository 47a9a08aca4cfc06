"""The page says what the tables say, in points."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sglang_probe.report.page import render
from sglang_probe.studies.pages import only
from sglang_probe.studies.sae_gap import tables
from sglang_probe.studies.sae_gap.page import BOTH, answer, gap_page, gaps_table
from tests.studies import made_results as made
from tests.studies.sae_gap.planted import VARIANCE, points


def test_gaps_are_shown_in_percentage_points() -> None:
    found = points(30, drift=0.05)
    floors = dict.fromkeys(("human", "reforward", "decoded"), 0.0)
    result = replace(made.sae_gap(), gaps=tables.gaps(found, VARIANCE, set(), floors))
    share = only(result.gaps, contrast=BOTH, texts="all")["gap"].iloc[0]
    assert share == pytest.approx(0.05, abs=0.005)
    assert f"a gap of {100 * share:+.1f} [" in answer(result)
    assert f"{100 * share:+.1f} [" in render(gap_page(result))
    assert gaps_table(result).frame["gap"].iloc[0] == pytest.approx(100 * share)


def test_the_cost_of_errors_is_told_for_each_kind_that_was_replaced() -> None:
    assert answer(made.sae_gap()).count("nats") == 2
    assert "nats" not in answer(made.sae_gap(spliced=[]))
