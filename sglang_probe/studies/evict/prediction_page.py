"""The section of the report on eviction that asks which offline metric foretells what is generated."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import panel_scatter
from sglang_probe.report.page import Section
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.evict.grid import BASELINE
from sglang_probe.studies.evict.judge import METRICS
from sglang_probe.studies.evict.study import EvictionResult
from sglang_probe.studies.evict.tables import (
    PROTOCOLS,
    best_predictors,
    budgets_of,
    kind_of,
    pairs_table,
    predictor_table,
    predictors_by_task,
    title_of,
)
from sglang_probe.studies.pages import only


def prediction(result: EvictionResult) -> Section | None:
    """Correlations of each metric, and differences between them."""
    if not len(result.predictors):
        return None
    outcome = title_of(result.outcome)
    points = only(result.points, kind=["method", "baseline"])
    if len(points):
        order = pd.CategoricalDtype(budgets_of(points), ordered=True)
        points = points.assign(
            panel=points["task"] + ", " + points["protocol"].map(PROTOCOLS), budget=points["budget"].astype(order)
        ).sort_values("budget", kind="stable")
    figures = [
        panel_scatter(
            points,
            "panel",
            metric,
            result.outcome,
            "budget",
            "policy",
            title=f"{title_of(metric).capitalize()} against {outcome}",
            caption=f"A point is a method at a budget. {METRICS[metric][0].upper()}{METRICS[metric][1:]}.",
            x_label=title_of(metric),
            y_label=outcome,
            kind=kind_of(result.outcome),
            x_kind=kind_of(metric),
        )
        for metric in ("nontrivial", "output_error")
        if metric in points
    ]
    by_task = predictors_by_task(result)
    by_cell = [Column("metric"), *(Column(c, c, "correlation") for c in map(str, by_task.columns[1:]))]
    return Section(
        heading=f"Which metric predicts {outcome}?",
        text=f"Within each task, protocol and budget, methods and {BASELINE} are ranked by the metric and by what was "
        "generated; Spearman's correlations are averaged over these cells. Metrics that are better when low are turned "
        "around. Oracles are left out, and so are methods as published and per-step selections. Intervals are over "
        "policies and prompts, the same ones for all metrics: the question is how the next method would be ranked on "
        "the next prompts. **Below best** is how much lower a metric's correlation is than the highest; where its "
        "interval holds 0 the two are not told apart. Every metric is of what is kept: rankings, too, are of the kept "
        "positions. "
        f"{_not_told_apart(result)}",
        figures=figures,
        tables=[
            predictor_table(result),
            pairs_table(result),
            Table(by_task, "mean Spearman by task and protocol", columns=by_cell, long=True, file="predictors"),
        ],
        notes=[f"**{title_of(k)}**: {METRICS[k]}." for k in best_predictors(result)["metric"] if k in METRICS],
    )


def _not_told_apart(result: EvictionResult) -> str:
    """Which metrics predict as well as the best, as far as these policies can say."""
    p = best_predictors(result)
    if "below_best_low" not in p or not p["below_best_low"].iloc[1:].notna().any():
        return "With so few policies nothing tells the metrics apart."
    close = p.iloc[1:][~(p["below_best_low"].iloc[1:] > 0)]
    if close.empty:
        return "The intervals tell all others from the best."
    return (
        f"Not told apart from the best, {title_of(p['metric'].iloc[0])}: {', '.join(map(title_of, close['metric']))}."
    )
