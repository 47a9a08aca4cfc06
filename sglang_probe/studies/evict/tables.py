"""Tables of an eviction study, wide enough to read: policies down, budgets across."""

from __future__ import annotations

import pandas as pd

from sglang_probe.studies.evict.predict import ALL
from sglang_probe.studies.evict.study import EvictionResult
from sglang_probe.studies.evict.summary import KINDS

PROTOCOLS = {"query_visible": "question visible", "query_hidden": "question hidden"}
"""Names of the protocols in reports."""


def budgets_of(frame: pd.DataFrame) -> list[str]:
    """Budgets of a study, smallest first."""
    named = {b: _size(b) for b in frame["budget"].unique()}
    return sorted(named, key=lambda b: named[b])


def middle_budget(result: EvictionResult) -> str:
    """The budget that tables of one budget show: the middle one, or the smaller of two."""
    found = budgets_of(result.offline)
    return found[(len(found) - 1) // 2]


def by_budget(
    means: pd.DataFrame,
    task: str,
    protocol: str,
    metric: str,
    *,
    kinds: tuple[str, ...] = KINDS,
    difference: bool = True,
) -> pd.DataFrame:
    """One metric of one task and protocol: kind, policy, and per budget the mean (and the difference with interval)."""
    part = means[(means["task"] == task) & (means["protocol"] == protocol) & (means["metric"] == metric)]
    part = part[part["kind"].isin(kinds)]
    rows = []
    for (kind, policy), mine in part.groupby(["kind", "policy"], sort=False):
        row: dict[str, object] = {"kind": kind, "policy": policy}
        at = mine.set_index("budget")
        for budget in budgets_of(part[part["kind"] != "full"]):
            if budget in at.index:
                row[budget] = at.at[budget, "mean"]
                if difference:
                    row[f"Δ {budget}"] = _interval(at.loc[budget])
            elif kind == "full":
                row[budget] = at["mean"].iloc[0]
        rows.append(row)
    return _in_order(pd.DataFrame(rows))


def accuracy_table(result: EvictionResult) -> tuple[pd.DataFrame, str]:
    """The greedy outcome of every policy by task and protocol at the middle budget, oracles apart."""
    decode = next(iter(result.outcomes))
    budget = middle_budget(result)
    frame = _across(result.outcomes[decode], result.outcome, budget)
    return frame, f"{result.outcome} in the engine, {decode}, budget {budget} (oracles read the future)"


def mass_table(result: EvictionResult) -> tuple[pd.DataFrame, str]:
    """Non-trivial mass recall of every policy by task and protocol at the middle budget."""
    budget = middle_budget(result)
    frame = _across(result.offline, "nontrivial", budget)
    return frame, f"non-trivial attention mass recall, offline, budget {budget}"


def predictor_table(result: EvictionResult) -> tuple[pd.DataFrame, str]:
    """Spearman of each metric with the outcome over all cells, best first."""
    p = result.predictors
    frame = p[(p["task"] == ALL)].sort_values("spearman", ascending=False)
    frame = frame[["metric", "cells", "policies", "spearman", "low", "high"]].reset_index(drop=True)
    return frame, f"which offline metric ranks policies as {result.outcome} does (mean Spearman, 95 % over prompts)"


def predictors_by_task(result: EvictionResult) -> pd.DataFrame:
    """Metrics down, tasks and protocols across."""
    p = result.predictors
    part = p[(p["budget"] == ALL) & (p["protocol"] != ALL)]
    part = part.assign(cell=part["task"] + ", " + part["protocol"].map(PROTOCOLS))
    order = list(dict.fromkeys(part["cell"]))
    wide = part.pivot(index="metric", columns="cell", values="spearman")[order]
    return wide.loc[[m for m in predictor_table(result)[0]["metric"] if m in wide.index]].reset_index()


def stages_table(result: EvictionResult) -> pd.DataFrame:
    """Wall time by stage, and the total."""
    rows = [*result.seconds.items(), ("total", sum(result.seconds.values()))]
    return pd.DataFrame(rows, columns=["stage", "s"])


def wide(part: pd.DataFrame, value: str = "mean") -> pd.DataFrame:
    """Metrics across, cells of one budget down, in the order in which cells first appear."""
    keys = ["task", "protocol", "kind", "policy"]
    cells = part[keys].drop_duplicates()
    metrics = list(dict.fromkeys(part["metric"]))
    found = part.pivot(index=keys, columns="metric", values=value)
    return found.loc[pd.MultiIndex.from_frame(cells), metrics].reset_index()


def gap_table(gaps: pd.DataFrame, budget: str) -> pd.DataFrame:
    """Regret and gap closed at one budget, each with its interval."""
    part = gaps[gaps["budget"] == budget]
    columns = {
        n: [_with_interval(*v) for v in part[[n, f"{n}_low", f"{n}_high"]].to_numpy()] for n in ("regret", "closed")
    }
    return part[["task", "protocol", "kind", "policy", "gap"]].assign(**columns).reset_index(drop=True)


def _with_interval(value: float, low: float, high: float) -> str | None:
    return None if pd.isna(value) else f"{value:.2f} ({low:.2f} to {high:.2f})"


def _across(means: pd.DataFrame, metric: str, budget: str) -> pd.DataFrame:
    part = means[(means["metric"] == metric) & ((means["budget"] == budget) | (means["kind"] == "full"))]
    part = part.assign(cell=part["task"] + ", " + part["protocol"].str.removeprefix("query_"))
    order = list(dict.fromkeys(part["cell"]))
    wide = part.pivot(index=["kind", "policy"], columns="cell", values="mean")[order]
    rows = list(dict.fromkeys(zip(part["kind"], part["policy"], strict=True)))
    return _in_order(wide.loc[rows].reset_index())


def _in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Full cache, baseline, methods, oracles, controls."""
    if not len(frame):
        return frame
    rank = frame["kind"].map(KINDS.index)
    return frame.iloc[rank.argsort(kind="stable")].reset_index(drop=True)


def _interval(row: pd.Series) -> str | None:
    if pd.isna(row["difference"]):
        return None
    star = "*" if row["p_holm"] <= 0.05 else ""
    return f"{row['difference']:+.2f} ({row['difference_low']:+.2f} to {row['difference_high']:+.2f}){star}"


def _size(budget: str) -> tuple[int, float]:
    above, _, below = budget.partition("/")
    return (0, int(above) / int(below)) if below else (1, float(above))
