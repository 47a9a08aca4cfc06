"""Tables of an eviction study, wide enough to read: policies down, budgets across."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sglang_probe.report.numbers import MISSING, Kind, format_interval, format_number
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.evict import judge, outcome
from sglang_probe.studies.evict.judge import METRICS
from sglang_probe.studies.evict.likelihoods import FORCED_OUTCOMES
from sglang_probe.studies.evict.outcome import OUTCOMES
from sglang_probe.studies.evict.predict import ALL
from sglang_probe.studies.evict.study import EvictionResult
from sglang_probe.studies.evict.summary import KINDS

PROTOCOLS = {"query_visible": "question visible", "query_hidden": "question hidden"}
"""Names of the protocols in reports."""

_MOST_METRICS = 8
"""In one table."""

_NO_SHARE = ("ndcg", "rbo", "js", "output_error", "head_error", "gap", "gini", "divergence", "nll", "answer_nll", "kl")


def title_of(metric: str) -> str:
    """A metric or an outcome in words."""
    return {**judge.SHORT, **outcome.SHORT}.get(metric, metric.replace("_", " "))


def kind_of(metric: str) -> Kind:
    """How a metric or an outcome is printed: shares in percent."""
    return "decimal" if metric in _NO_SHARE else "percent"


def budgets_of(frame: pd.DataFrame) -> list[str]:
    """Budgets of a study, smallest first."""
    named = {b: _size(b) for b in (frame["budget"].unique() if len(frame) else ())}
    return sorted(named, key=lambda b: named[b])


def middle_budget(result: EvictionResult) -> str:
    """The budget that tables of one budget show: the middle one, or the smaller of two."""
    found = budgets_of(result.offline)
    return found[(len(found) - 1) // 2] if found else "none"


def by_budget(
    means: pd.DataFrame,
    task: str,
    protocol: str,
    metric: str,
    *,
    kinds: tuple[str, ...] = KINDS,
    difference: bool = True,
) -> pd.DataFrame:
    """One metric of one task and protocol: kind, policy, and per budget the mean (and the difference with interval, in
    percentage points of what is a share)."""
    if means.empty:
        return means
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
                    row[f"Δ {budget}"] = _interval(at.loc[budget], 100 if kind_of(metric) == "percent" else 1)
            elif kind == "full":
                row[budget] = at["mean"].iloc[0]
        rows.append(row)
    return _in_order(pd.DataFrame(rows))


def budget_table(
    means: pd.DataFrame,
    task: str,
    protocol: str,
    metric: str,
    caption: str,
    *,
    kinds: tuple[str, ...] = KINDS,
    file: str = "",
) -> Table:
    """`by_budget` for a page, folded away: the policy, and by budget the mean with its difference to the baseline."""
    frame = by_budget(means, task, protocol, metric, kinds=kinds)
    columns = [str(c) for c in frame.columns[2:]]
    pairs = [[Column(b, b, kind_of(metric)), Column(f"Δ {b}", f"Δ at {b}, 95 %")] for b in columns if "Δ" not in b]
    cells = [c for pair in pairs for c in pair if c.name in columns]
    return Table(frame, caption, columns=[Column("policy"), *cells, Column("kind")], long=True, file=file)


def budget_tables(
    means: pd.DataFrame, metric: str, said: str, *, kinds: tuple[str, ...] = KINDS, file: str = ""
) -> list[Table]:
    """`budget_table` of every task and protocol; `said` follows their names."""
    cells = means[["task", "protocol"]].drop_duplicates() if len(means) else means
    return [
        budget_table(means, task, protocol, metric, f"{task}, {PROTOCOLS[protocol]}{said}", kinds=kinds, file=file)
        for task, protocol in cells.itertuples(index=False, name=None)
    ]


def accuracy_table(result: EvictionResult) -> Table:
    """The greedy outcome of every policy by task and protocol at the middle budget, oracles apart."""
    decode = next(iter(result.outcomes))
    title = f"{result.outcome} in the engine, {decode}, budget {middle_budget(result)} (oracles read the future)"
    return _across(result, result.outcomes[decode], result.outcome, title)


def mass_table(result: EvictionResult) -> Table:
    """Non-trivial mass recall of every policy by task and protocol at the middle budget."""
    title = f"non-trivial attention mass recall, offline, budget {middle_budget(result)}"
    return _across(result, result.offline, "nontrivial", title)


def best_predictors(result: EvictionResult) -> pd.DataFrame:
    """Spearman of each metric with the outcome over all cells, best first."""
    p = result.predictors
    if p.empty:
        return p
    return p[p["task"] == ALL].sort_values("spearman", ascending=False).reset_index(drop=True)


def predictor_table(result: EvictionResult) -> Table:
    """`best_predictors` as it is printed."""
    columns = [
        Column("metric"),
        Column("spearman", "mean Spearman, 95 %", "correlation", bounds=("low", "high")),
        Column("below_best", "below best, 95 %", "correlation", bounds=("below_best_low", "below_best_high")),
        Column("cells"),
        Column("policies"),
    ]
    title = f"which offline metric ranks policies as {result.outcome} does"
    return Table(_titled(best_predictors(result)), title, columns=columns)


def pairs_table(result: EvictionResult) -> Table:
    """Which of two metrics predicts better."""
    columns = [
        Column("metric"),
        Column("other", "beside"),
        Column("difference", "difference, 95 %", "correlation", bounds=("low", "high")),
        Column("apart", "told apart"),
    ]
    frame = result.predictor_pairs
    if len(frame):
        words = {"other": frame["other"].map(title_of), "apart": np.where(frame["told"], "yes", "no")}
        frame = _titled(frame).assign(**words)
    title = "differences of two metrics' correlations, over the same policies and prompts"
    return Table(frame, title, columns=columns, long=True, file="predictor_pairs")


def predictors_by_task(result: EvictionResult) -> pd.DataFrame:
    """Metrics down, tasks and protocols across."""
    p = result.predictors
    if p.empty:
        return p
    part = p[(p["budget"] == ALL) & (p["protocol"] != ALL)]
    part = part.assign(cell=part["task"] + ", " + part["protocol"].map(PROTOCOLS))
    order = list(dict.fromkeys(part["cell"]))
    wide = part.pivot(index="metric", columns="cell", values="spearman")[order]
    return _titled(wide.loc[[m for m in best_predictors(result)["metric"] if m in wide.index]].reset_index())


def stages_table(result: EvictionResult) -> Table:
    """Wall time by stage, and the total."""
    rows = [*result.seconds.items(), ("total", sum(result.seconds.values()))]
    frame = pd.DataFrame(rows, columns=["stage", "seconds"])
    return Table(frame, "wall time", columns=[Column("stage"), Column("seconds", kind="seconds")])


def metrics_tables(part: pd.DataFrame, caption: str, value: str = "mean", file: str = "") -> list[Table]:
    """`wide` for a page, folded away, in tables that a page has room for."""
    frame = worded(wide(part, value))
    columns = [Column("task"), Column("protocol"), Column("policy")]
    known = [Column(c, title_of(c), kind_of(c)) for c in (*METRICS, *OUTCOMES, *FORCED_OUTCOMES) if c in frame]
    parts = [known[i : i + _MOST_METRICS] for i in range(0, max(len(known), 1), _MOST_METRICS)]
    return [
        Table(
            frame,
            caption + (f", part {i + 1}" if len(parts) > 1 else ""),
            columns=[*columns, *some],
            long=True,
            file=file,
        )
        for i, some in enumerate(parts)
    ]


def wide(part: pd.DataFrame, value: str = "mean") -> pd.DataFrame:
    """Metrics across, cells of one budget down, in the order in which cells first appear."""
    keys = ["task", "protocol", "kind", "policy"]
    if part.empty:
        return part
    cells = part[keys].drop_duplicates()
    metrics = list(dict.fromkeys(part["metric"]))
    found = part.pivot(index=keys, columns="metric", values=value)
    return found.loc[pd.MultiIndex.from_frame(cells), metrics].reset_index()


def gap_table(gaps: pd.DataFrame, budget: str, caption: str, file: str = "") -> Table:
    """Regret and gap closed at one budget, each with its interval."""
    columns = [Column("task"), Column("protocol"), Column("policy")]
    columns += [
        Column(n, f"{title}, 95 %", "percent", bounds=(f"{n}_low", f"{n}_high"))
        for n, title in (("closed", "share closed"), ("regret", "regret"))
    ]
    columns.append(Column("gap", "whole gap", "percent"))
    shown = worded(gaps[gaps["budget"] == budget]) if len(gaps) else gaps
    return Table(shown, caption, columns=columns, long=True, file=file)


def worded(frame: pd.DataFrame) -> pd.DataFrame:
    """With the protocol in words."""
    if frame.empty:
        return frame
    return frame.assign(protocol=[PROTOCOLS.get(p, p) for p in frame["protocol"]]).reset_index(drop=True)


def _across(result: EvictionResult, means: pd.DataFrame, metric: str, caption: str) -> Table:
    if means.empty:
        return Table(means, caption)
    part = means[(means["metric"] == metric) & ((means["budget"] == middle_budget(result)) | (means["kind"] == "full"))]
    part = part.assign(cell=part["task"] + ", " + part["protocol"].map(PROTOCOLS))
    order = list(dict.fromkeys(part["cell"]))
    wide = part.pivot(index=["kind", "policy"], columns="cell", values="mean")[order]
    rows = list(dict.fromkeys(zip(part["kind"], part["policy"], strict=True)))
    frame = _in_order(wide.loc[rows].reset_index())
    cells = [Column(c, c, kind_of(metric)) for c in map(str, frame.columns[2:])]
    return Table(frame, caption, columns=[Column("policy"), *cells, Column("kind")])


def parameters_tables(result: EvictionResult) -> Sequence[Table]:
    """Every parameter of every policy, and what a budget is in positions."""
    policies = [Column("policy"), Column("parameters"), Column("kind"), Column("source")]
    lengths = [
        Column("task"),
        Column("protocol"),
        Column("budget"),
        Column("share", kind="percent"),
        Column("b", "positions kept", "average"),
        Column("L", "positions compressed", "average"),
        Column("prompts"),
    ]
    return [
        Table(result.policies, "policies", columns=policies, long=True, file="policies"),
        Table(worded(result.lengths), "budgets in positions", columns=lengths, long=True, file="lengths"),
    ]


def _in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Full cache, baseline, methods, oracles, controls."""
    if not len(frame):
        return frame
    rank = frame["kind"].map(KINDS.index)
    return frame.iloc[rank.argsort(kind="stable")].reset_index(drop=True)


def _interval(row: pd.Series, scale: int) -> str | None:
    if pd.isna(row["difference"]):
        return None
    star = "*" if row["p_holm"] <= 0.05 else ""
    kind: Kind = "points" if scale == 100 else "signed"
    value, low, high = (scale * row.get(c, float("nan")) for c in ("difference", "difference_low", "difference_high"))
    interval = format_interval(low, high, kind)
    return f"{format_number(value, kind)}{'' if interval == MISSING else ' ' + interval}{star}"


def _titled(frame: pd.DataFrame) -> pd.DataFrame:
    """With the metric in words."""
    return frame.assign(metric=frame["metric"].map(title_of)) if len(frame) else frame


def _size(budget: str) -> tuple[int, float]:
    above, _, below = budget.partition("/")
    return (0, int(above) / int(below)) if below else (1, float(above))
