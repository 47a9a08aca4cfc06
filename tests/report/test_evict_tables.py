"""Tables of an eviction study: budgets by size, the full cache beside all of them, stars where the tests say so."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sglang_probe.report.tables import MISSING
from sglang_probe.studies.evict.tables import budgets_of, by_budget, gap_table, wide


def means() -> pd.DataFrame:
    rows = [
        ("full", "full cache", "1", 1.0, np.nan, np.nan),
        ("oracle", "o", "1/16", 0.9, 0.8, np.nan),
        ("baseline", "protected random", "1/16", 0.1, np.nan, np.nan),
        ("method", "m", "1/2", 0.6, 0.1, 0.2),
        ("method", "m", "1/16", 0.3, 0.2, 0.01),
    ]
    frame = pd.DataFrame(rows, columns=["kind", "policy", "budget", "mean", "difference", "p_holm"])
    frame = frame.assign(task="t", protocol="p", metric="accuracy")
    return frame.assign(difference_low=frame["difference"] - 0.05, difference_high=frame["difference"] + 0.05)


def test_budgets_are_ordered_by_size_and_numbers_follow_shares() -> None:
    assert budgets_of(pd.DataFrame({"budget": ["1/2", "64", "1/16", "8"]})) == ["1/16", "1/2", "8", "64"]


def test_the_full_cache_stands_beside_every_budget_and_kinds_are_in_order() -> None:
    table = by_budget(means(), "t", "p", "accuracy")
    assert table["kind"].tolist() == ["full", "baseline", "method", "oracle"]
    assert [c for c in table.columns if not c.startswith("Δ")] == ["kind", "policy", "1/16", "1/2"]
    rows = table.set_index("policy")
    assert rows.loc["full cache", ["1/16", "1/2"]].tolist() == [1.0, 1.0]
    assert rows.loc["m", "Δ 1/16"] == "+20.0 [+15.0, +25.0]*"
    assert rows.loc["m", "Δ 1/2"] == "+10.0 [+5.0, +15.0]"
    assert pd.isna(rows.loc["protected random", "Δ 1/16"])
    assert np.isnan(rows.loc["o", "1/2"])


def test_wide_tables_keep_the_order_of_the_study() -> None:
    frame = pd.concat([means().query("budget == '1/16'"), means().query("budget == '1/16'").assign(metric="a")])
    table = wide(frame)
    assert table["policy"].tolist() == ["o", "protected random", "m"]
    assert list(table.columns[4:]) == ["accuracy", "a"]


def test_a_gap_that_does_not_exist_has_no_share() -> None:
    frame = pd.DataFrame(
        {"task": "t", "protocol": "p", "kind": "method", "policy": ["m", "n"], "budget": "1/8", "gap": [0.5, -0.1]}
    )
    for name, values in (("regret", (0.2, 0.3)), ("closed", (0.4, np.nan))):
        frame = frame.assign(**{name: values, f"{name}_low": values, f"{name}_high": values})
    printed = {c.header: c.cells for c in gap_table(frame, "1/8", "gaps").printed()}
    assert printed["share closed, 95 %"] == ["40.0% [40.0%, 40.0%]", MISSING]
    assert printed["regret, 95 %"] == ["20.0% [20.0%, 20.0%]", "30.0% [30.0%, 30.0%]"]
