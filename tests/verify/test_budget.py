"""What a ledger may say of a budget: the order in which the instrument tells it, and no other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from sglang_probe.run import schema
from sglang_probe.verify.budget import budget_holds

LIMIT = 2.0


def run_of(*events: tuple[str, float, str | None], action: str = "off") -> Any:
    rows = [
        {
            "dp_rank": 0,
            "forward_id": i,
            "time": float(i),
            "event": e,
            "milliseconds": ms,
            "budget_ms": LIMIT,
            "rid": rid,
        }
        for i, (e, ms, rid) in enumerate(events)
    ]
    nothing = {"interventions": pd.DataFrame(columns=["rid"]), "gates": pd.DataFrame(columns=["rid"])}
    return SimpleNamespace(
        manifest={"steer": {"budget_ms": LIMIT, "over_budget": action}, "starts": [{}]},
        budget=lambda: pd.DataFrame(rows, columns=["dp_rank", *schema.BUDGET.names]),
        interventions=lambda: nothing["interventions"],
        gates=lambda: nothing["gates"],
        spans=lambda: pd.DataFrame({"rid": [], "intervention": [], "start": [], "end": []}),
    )


def test_a_request_that_was_turned_away_may_be_launched_after_the_budget_is_kept_again() -> None:
    run = run_of(("exceeded", 3, None), ("within", 0, None), ("unsteered", 0, "r1"))
    assert budget_holds(run).violation is None


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([("unsteered", 0, "r1"), ("exceeded", 3, None)], "it was not exceeded"),
        ([("within", 0, None)], "it was not exceeded"),
        ([("exceeded", 3, None), ("within", 0, None), ("within", 0, None)], "it was not exceeded"),
        ([("exceeded", 1, None)], "it was exceeded by 1 ms"),
        ([("exceeded", 3, None), ("exceeded", 3, None)], "it was exceeded already"),
    ],
)
def test_another_order_is_a_violation(events: list[Any], says: str) -> None:
    assert says in str(budget_holds(run_of(*events)).violation)
