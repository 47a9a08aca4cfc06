"""Sections of the report on eviction that are judged offline: kept attention mass, heads, and negative controls."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import fold, heatmap, lines
from sglang_probe.report.numbers import Kind, format_interval, format_number
from sglang_probe.report.page import Section
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.evict.judge import METRICS
from sglang_probe.studies.evict.study import EvictionResult
from sglang_probe.studies.evict.tables import (
    PROTOCOLS,
    budget_tables,
    budgets_of,
    gap_table,
    kind_of,
    mass_table,
    metrics_tables,
    middle_budget,
    title_of,
    worded,
)
from sglang_probe.studies.pages import MANY_LAYERS, only

TESTED = (
    "Δ is the paired difference to protected random (of shares, in percentage points) with its 95 % interval over "
    "prompts (Student's t, corrected for skewness); * marks a p of at most 0.05 by the same test, after Holm over all "
    "methods and budgets of the task and protocol."
)


_MOST_HEADS = 48
"""Of more, a figure shows the layers."""


def mass(result: EvictionResult) -> Section:
    """Non-trivial mass by budget, all metrics at one budget, and their chance levels."""
    kinds = ("baseline", "method", "oracle")
    tables = [mass_table(result)]
    said = ": non-trivial mass recall by budget"
    budget = middle_budget(result)
    tables += budget_tables(
        result.offline, "nontrivial", said, kinds=("baseline", "method", "published", "oracle"), file="offline"
    )
    part = only(result.offline, budget=budget, metric=list(METRICS), kind=kinds)
    tables += metrics_tables(part, f"all metrics, budget {budget}", file="offline")
    if "chance" in part and part["chance"].notna().any():
        known = part[part["chance"].notna()]
        tables += metrics_tables(known, f"their chance levels, budget {budget}, exact", "chance", file="offline")
    if len(result.mass_gaps):
        bound = result.mass_gaps["bound"].iloc[0] if "bound" in result.mass_gaps else "the bound"
        title = f"prompt mass: regret to {bound}, and share of the gap to it that is closed, budget {budget}"
        tables.append(gap_table(result.mass_gaps, budget, title, file="mass_gaps"))
    return Section(
        heading="Offline: what is kept of the attention",
        text=f"Judged on the full-cache run's own decode steps. {TESTED} Adaptive budgets, per-step selections and "
        "another always-kept set than the baseline's change how many candidates a policy keeps; the chance table "
        "shows what that alone gives.",
        tables=tables,
        notes=[f"**{title_of(k)}**: {text}." for k, text in METRICS.items()],
        nothing="no selection was judged",
    )


def needed(result: EvictionResult) -> Section | None:
    """What the answers need, found by removal, and how much of it each policy keeps."""
    if result.needed.empty:
        return None
    columns = [Column("task"), Column("protocol"), Column("prompts"), Column("right", "answered right", "percent")]
    columns += [Column("positions", "positions needed", "average"), Column("ranges", "in so many ranges", "average")]
    for name, said in (("", "their removal"), ("control_", "removal of as many others")):
        columns.append(Column(f"{name}breaks", f"wrong after {said}", "percent"))
        columns.append(Column(f"{name}drop", f"nats lost by {said}, median", "decimal"))
    tables = [Table(worded(result.needed), "what the answers need", columns=columns, file="needed")]
    kinds = ("baseline", "method", "oracle")
    said = ": needed positions kept, by budget"
    tables += budget_tables(result.offline, "needed_kept", said, kinds=kinds, file="offline")
    return Section(
        heading="What the answers need",
        text="Found by removing stretches of the prompt from the cache of the model, run by transformers in float32, "
        "and halving those whose removal costs the right answer 1 nat or makes it wrong. What is written twice is not "
        f"found. {TESTED}",
        tables=tables,
        notes=[f"**{title_of(k)}**: {METRICS[k]}." for k in ("needed_kept", "lost_everywhere")],
        nothing="nothing was looked for",
    )


def equal_terms(result: EvictionResult) -> Section | None:
    """Every method under the study's always-kept set beside the same method as published."""
    frame = result.protection
    if frame.empty:
        return None
    tables = []
    for metric in dict.fromkeys(frame["metric"]):
        part = worded(only(frame, metric=metric))
        size = {b: i for i, b in enumerate(budgets_of(part))}
        part = part.sort_values("budget", key=lambda b, size=size: b.map(size), kind="stable")  # type: ignore[misc]
        share = kind_of(metric) == "percent"
        part = part.assign(change=[_change(r, 100 if share else 1) for _, r in part.iterrows()])
        columns = [
            Column("policy"),
            Column("budget"),
            Column("equal", "on equal terms", kind_of(metric)),
            Column("published", "as published", kind_of(metric)),
            Column("change", "difference, 95 %"),
            Column("task"),
            Column("protocol"),
        ]
        named = title_of(metric) + (", percentage points" if share else "")
        tables.append(Table(part, named, columns=columns, long=len(part) > 12, file="protection"))
    return Section(
        heading="Equal terms: what protection alone does",
        text="Everywhere else on this page **methods keep the same first and last positions** as the baseline and the "
        "oracles, so that they differ in their scores. Here each stands beside itself *as published*: with the "
        "always-kept set that its paper or this study's file gives it. Differences are paired within prompts. A method "
        "whose own set is the study's is not listed. Rows of kind `published` in the other tables are these.",
        tables=tables,
    )


def _change(row: pd.Series, scale: int) -> str:
    kind: Kind = "points" if scale == 100 else "signed"
    value, low, high = (scale * row.get(c, float("nan")) for c in ("difference", "difference_low", "difference_high"))
    return f"{format_number(value, kind)} {format_interval(low, high, kind)}".strip()


def heads(result: EvictionResult) -> Section:
    """Which layers and heads lose mass."""
    budget = middle_budget(result)
    part = only(result.heads, budget=budget, kind=["baseline", "method"])
    few = len(part[["layer", "head"]].drop_duplicates()) <= _MOST_HEADS if len(part) else True
    if len(part) and few:
        part = part.assign(where="L" + part["layer"].astype(str) + " H" + part["head"].astype(str))
    elif len(part):
        keys = ["task", "protocol", "policy", "layer"]
        part = part.assign(held=part["recall"] * part["mass"])
        part = part.groupby(keys, sort=False, as_index=False)[["held", "mass"]].sum()
        part = part.assign(
            recall=part["held"] / part["mass"].where(part["mass"] > 0), where="L" + part["layer"].astype(str)
        )
    of = "layer and query head" if few else "layer"
    figures = []
    for (task, protocol), mine in part.groupby(["task", "protocol"], sort=False) if len(part) else ():
        title = f"{task}, {PROTOCOLS[str(protocol)]}: non-trivial mass recall by {of}, budget {budget}"
        chart = heatmap(mine, "policy", "where", "recall", title=title, column_label=of, missing="no mass")
        if few or mine["layer"].nunique() <= MANY_LAYERS:
            figures.append(chart)
            continue
        curves = lines(
            mine.sort_values(["policy", "layer"], kind="stable"),
            "layer",
            "recall",
            "policy",
            kind="percent",
            title=title,
            x_label="layer",
            y_label="recall",
            caption="Sums over the heads of a layer.",
        )
        figures += [curves, fold(chart)]
    return Section(
        heading="Where it is lost: layers and heads",
        text="Sums over prompts and steps. A head that looks only at the last positions has little mass outside the "
        "trivial set, so that a method can lose all of it without losing an answer. Every head is in `tables/heads`.",
        figures=figures,
        nothing="no selection was judged by head",
    )


def controls(result: EvictionResult) -> Section | None:
    """Methods fed with what must not help."""
    part = only(result.offline, metric="nontrivial", kind=["method", "control"])
    names = set(only(part, kind="control")["policy"]) if len(part) else set()
    if not names:
        return None
    sources = {n.split(": ")[0] for n in names}
    rows = part[part["policy"].isin(names | sources)].sort_values(["task", "protocol", "policy"], kind="stable")
    columns = [
        Column("policy"),
        Column("mean", "recall, 95 % interval", "percent", bounds=("low", "high")),
        Column("chance", kind="percent"),
        Column("budget"),
        Column("task"),
        Column("protocol"),
    ]
    return Section(
        heading="Negative controls",
        text="Methods fed with what must not help: keys in another order, the queries of another request, queries "
        "from the middle of the prompt in place of the last ones. The drop from a method's own row is what it owes to "
        "the thing that was spoiled; at the chance level beside it, it owes everything to it. If another request's "
        "queries work equally well, the method is not using this request's question; it keeps positions that every "
        "query attends to.",
        tables=[Table(worded(rows), "non-trivial mass recall", columns=columns, long=len(rows) > 12, file="offline")],
    )
