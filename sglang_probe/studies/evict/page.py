"""The report of an eviction study."""

from __future__ import annotations

import pandas as pd

from sglang_probe.paths import BUILT_IN_MODELS
from sglang_probe.report.figures import Figure, grouped_bars, panel_lines, panel_scatter
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table, format_number
from sglang_probe.studies.evict.grid import BASELINE
from sglang_probe.studies.evict.judge import METRICS
from sglang_probe.studies.evict.likelihoods import FORCED_OUTCOMES
from sglang_probe.studies.evict.offline_page import TESTED, controls, heads, mass
from sglang_probe.studies.evict.outcome import OUTCOMES
from sglang_probe.studies.evict.study import EvictionResult
from sglang_probe.studies.evict.tables import (
    PROTOCOLS,
    accuracy_table,
    best_predictors,
    budget_table,
    budgets_of,
    gap_table,
    kind_of,
    metrics_table,
    middle_budget,
    parameters_tables,
    predictor_table,
    predictors_by_task,
    stages_table,
)
from sglang_probe.studies.pages import facts, footer


def eviction_page(result: EvictionResult) -> Page:
    """The page of one study: what each method keeps, what is generated from it, and which metric foretells it."""
    sections = [_curves(result), _accuracy(result), _prediction(result)] if result.outcomes else []
    sections += [
        mass(result),
        heads(result),
        controls(result),
        _likelihood(result),
        _parameters(result),
        _run(result),
    ]
    return Page(
        title=f"KV-cache eviction: {result.name}",
        lead=conclusions(result),
        tiles=_tiles(result),
        facts=facts(
            result.manifest,
            ("tasks", ", ".join(f"{t} ({n} prompts)" for t, n in _prompts(result).items())),
            ("budgets", ", ".join(budgets_of(result.offline)) + " of the positions that are compressed, per kv head"),
            ("always kept by protected random", _trivial(result)),
        ),
        sections=[s for s in sections if s is not None],
        footer=footer(result.manifest, "Every number was measured in the runs of this study's folder."),
    )


def conclusions(result: EvictionResult) -> str:
    """What can and what cannot be concluded, from the numbers alone."""
    told = []
    if result.outcomes:
        decode = next(iter(result.outcomes))
        tested, better, worse = _tested(result)
        told.append(
            f"Of {len(tested)} cells (method, budget, task, protocol) that were generated in the engine ({decode}), "
            f"{len(better)} have more {result.outcome} than protected random and {len(worse)} less, at a family-wise "
            "5 % within each task and protocol."
        )
        always = _everywhere(tested, better)
        told.append(
            f"Better in every cell: {', '.join(always)}." if always else "No method is better than it in every cell."
        )
    if len(result.predictors):
        best = best_predictors(result).iloc[0]
        told.append(
            f"The offline metric that ranks methods most like {result.outcome} is `{best['metric']}` (mean Spearman "
            f"{best['spearman']:.2f}{_between(best)}). {_not_told_apart(result)}"
        )
    told += result.caveats
    small = "the model is small, its tasks are synthetic or short, and there is one training seed; "
    told.append(
        f"\n\nWhat this cannot tell: {small if _built_in(result) else ''}intervals are over prompts alone, on one "
        "model and one engine. Rankings are those of these parameters, which are all listed below. Nothing is freed in "
        "the engine, so no number here is about speed."
        if result.outcomes
        else "\n\nNothing was generated under a kept set here: these are statements about attention, not about answers."
    )
    return " ".join(told)


def _between(row: pd.Series) -> str:
    return "" if pd.isna(row["low"]) else f", {row['low']:.2f} to {row['high']:.2f} over policies"


def _not_told_apart(result: EvictionResult) -> str:
    """Which metrics predict as well as the best, as far as these policies can say."""
    p = best_predictors(result)
    close = p.iloc[1:][~(p["below_best_low"].iloc[1:] > 0)]
    if close.empty:
        return "The intervals tell all others from it."
    return f"Not told apart from it: {', '.join(f'`{m}`' for m in close['metric'])}."


def _built_in(result: EvictionResult) -> bool:
    return result.config["model"] in BUILT_IN_MODELS


def _tested(result: EvictionResult) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Cells of methods that were tested against protected random, those that are better, and those that are worse."""
    frame = next(iter(result.outcomes.values()))
    part = frame[(frame["metric"] == result.outcome) & (frame["kind"] == "method")]
    tested = part[part["p"].notna()]
    sure = tested[tested["p_holm"] <= 0.05]
    return tested, sure[sure["difference"] > 0], sure[sure["difference"] < 0]


def _everywhere(tested: pd.DataFrame, better: pd.DataFrame) -> list[str]:
    cells, won = tested.groupby("policy", sort=False).size(), better.groupby("policy").size()
    return [p for p, n in cells.items() if won.get(p, 0) == n]


def _tiles(result: EvictionResult) -> list[Tile]:
    tiles = []
    if result.sanity is not None:
        tiles.append(
            Tile(
                "budget 100 %",
                f"{result.sanity.exact} of {result.sanity.requests}",
                "requests whose kept set holds everything, or that have none, give the full cache's tokens exactly",
            )
        )
    if result.outcomes:
        tested, better, _ = _tested(result)
        text = (
            f"cells (method, budget, task, protocol) with more {result.outcome} than protected random, family-wise 5 %"
        )
        tiles.append(Tile("better than random", f"{len(better)} of {len(tested)}", text))
    if len(result.predictors):
        best = best_predictors(result).iloc[0]
        tiles.append(Tile("best predictor", str(best["metric"]), f"mean Spearman {best['spearman']:.2f}"))
    return tiles


def _curves(result: EvictionResult) -> Section:
    """Policies ranked at one budget, and the outcome by budget, a panel per method."""
    figures = _ranking(result)
    for decode, frame in result.outcomes.items():
        part = frame[(frame["metric"] == result.outcome) & frame["kind"].isin(["method", "baseline", "oracle"])]
        figures += [_curve(result, part[part["task"] == t], str(t), decode) for t in dict.fromkeys(part["task"])]
    return Section(
        heading=f"{result.outcome.capitalize()} by budget",
        text=f"{_said(result.outcome)} Intervals are 95 % over prompts (Student's t, corrected for skewness). Oracles, "
        "marked so, read the future and bound what a kept set can do.",
        figures=figures,
    )


def _ranking(result: EvictionResult) -> list[Figure]:
    """Policies at the middle budget, best first, a figure per task."""
    decode, frame = next(iter(result.outcomes.items()))
    budget = middle_budget(result)
    part = frame[(frame["metric"] == result.outcome) & (frame["budget"] == budget)]
    part = _labelled(part[part["kind"].isin(["method", "baseline", "oracle"])])
    figures = []
    for task, mine in part.groupby("task", sort=False):
        order = mine.groupby("panel")["mean"].mean().sort_values(ascending=False, kind="stable").index
        ranked = mine.assign(panel=pd.Categorical(mine["panel"], list(order), ordered=True)).sort_values("panel")
        figures.append(
            grouped_bars(
                ranked,
                "panel",
                "series",
                "mean",
                low="low",
                high="high",
                kind=kind_of(result.outcome),
                title=f"{task}: {result.outcome} at budget {budget}, {decode}",
                caption="Best first, by the mean over protocols.",
            )
        )
    return figures


def _labelled(part: pd.DataFrame) -> pd.DataFrame:
    """With names of policies and protocols for figures."""
    names = part["policy"].where(part["kind"] != "oracle", "oracle: " + part["policy"])
    return part.assign(panel=names, series=part["protocol"].map(PROTOCOLS))


def _curve(result: EvictionResult, part: pd.DataFrame, task: str, decode: str) -> Figure:
    sizes = _shares(result, task)
    frame = _labelled(part).assign(x=part["budget"].map(sizes))
    frame = frame.sort_values("kind", key=lambda k: k == "oracle", kind="stable")
    base = frame[frame["policy"] == BASELINE]
    return panel_lines(
        frame[frame["policy"] != BASELINE],
        "panel",
        "x",
        "mean",
        "series",
        low="low",
        high="high",
        behind=base,
        x_ticks={sizes[b]: b for b in budgets_of(part)},
        log_x=True,
        kind=kind_of(result.outcome),
        title=f"{task}: {result.outcome} by budget, {decode}",
        caption="One panel per policy. Dashed: protected random.",
        x_label="budget, share of the compressed positions",
    )


def _accuracy(result: EvictionResult) -> Section:
    tables = [accuracy_table(result)]
    for decode, frame in result.outcomes.items():
        if result.outcome not in set(frame["metric"]):
            continue
        for task, protocol in frame[["task", "protocol"]].drop_duplicates().itertuples(index=False, name=None):
            title = f"{task}, {PROTOCOLS[protocol]}, {decode}: {result.outcome} by budget"
            tables.append(budget_table(frame, task, protocol, result.outcome, title))
    if len(result.outcome_gaps):
        title = f"lost to the full cache, and share of protected random's loss won back, budget {middle_budget(result)}"
        tables.append(gap_table(result.outcome_gaps, middle_budget(result), title))
    others = [m for m in OUTCOMES if m != result.outcome]
    first = next(iter(result.outcomes.values()))
    part = first[(first["metric"].isin(others)) & (first["budget"].isin([middle_budget(result), "1"]))]
    tables.append(metrics_table(part, f"other outcomes at budget {middle_budget(result)}"))
    return Section(
        heading="What was generated",
        text=f"{TESTED} Oracle rows are bounds and are not tested.",
        tables=tables,
        notes=[f"`{k}`: {text}." for k, text in OUTCOMES.items()],
    )


def _prediction(result: EvictionResult) -> Section | None:
    if not len(result.predictors):
        return None
    points = result.points[result.points["kind"].isin(["method", "baseline"])]
    points = points.assign(panel=points["task"] + ", " + points["protocol"].map(PROTOCOLS))
    order = pd.CategoricalDtype(budgets_of(points), ordered=True)
    points = points.assign(budget=points["budget"].astype(order)).sort_values("budget", kind="stable")
    figures = [
        panel_scatter(
            points,
            "panel",
            metric,
            result.outcome,
            "budget",
            "policy",
            title=f"`{metric}` against {result.outcome}",
            caption=f"A point is a method at a budget. {METRICS[metric][0].upper()}{METRICS[metric][1:]}.",
            x_label=metric,
            y_label=result.outcome,
        )
        for metric in ("nontrivial", "output_error")
        if metric in points
    ]
    by_task = predictors_by_task(result)
    by_cell = [Column("metric"), *(Column(c, c, "signed", digits=2) for c in map(str, by_task.columns[1:]))]
    return Section(
        heading=f"Which metric predicts {result.outcome}?",
        text="Within each task, protocol and budget, methods and protected random are ranked by the metric and by "
        "what was generated; Spearman's correlations are averaged over these cells. Metrics that are better when low "
        "are turned around. Oracles are left out, and so are per-step selections, which were not generated from. "
        "Intervals are over policies, the same ones for all metrics: the question is how the next method would be "
        "ranked. **Below best** is how much lower a metric's correlation is than the highest; where its interval holds "
        "0 the two are not told apart. Every metric is of what is kept: rankings, too, are of the kept positions. "
        f"{_not_told_apart(result)}",
        figures=figures,
        tables=[
            predictor_table(result),
            Table(by_task, "mean Spearman by task and protocol", columns=by_cell, long=True),
        ],
        notes=[f"`{k}`: {METRICS[k]}." for k in best_predictors(result)["metric"] if k in METRICS],
    )


def _likelihood(result: EvictionResult) -> Section | None:
    frame = result.outcomes.get("forced")
    if frame is None:
        return None
    tables = []
    for task, protocol in frame[["task", "protocol"]].drop_duplicates().itertuples(index=False, name=None):
        title = f"{task}, {PROTOCOLS[protocol]}: nll, nats per token; lower is better"
        tables.append(budget_table(frame, task, protocol, "nll", title))
    return Section(
        heading="Likelihood of the reference, teacher-forced",
        text=TESTED,
        tables=tables,
        notes=[f"`{k}`: {text}." for k, text in FORCED_OUTCOMES.items()],
    )


def _parameters(result: EvictionResult) -> Section:
    return Section(
        heading="Every parameter",
        text="Window, pooling, group reduction and always-kept set move results by more than many methods differ.",
        tables=parameters_tables(result),
    )


def _run(result: EvictionResult) -> Section:
    tables = [stages_table(result)]
    if len(result.served):
        columns = [Column(c) for c in ("task", "decode", "asked", "failed", "truncated", "kept_counts_asserted")]
        tables.append(Table(result.served, "requests in the engine", columns=columns))
    if len(result.excluded):
        columns = [Column(str(c)) for c in result.excluded.columns]
        tables.append(Table(result.excluded, "selections that were left out", columns=columns))
    text = (
        f"The number of kept entries was asserted on {format_number(result.asserted)} selections and "
        f"{format_number(result.asserted_in_engine)} requests served."
    )
    return Section(heading="The run", text=text, tables=tables)


def _shares(result: EvictionResult, task: str) -> dict[str, float]:
    mine = result.lengths[result.lengths["task"] == task]
    return {str(b): float(s) for b, s in mine.groupby("budget")["share"].mean().items()}


def _prompts(result: EvictionResult) -> dict[str, int]:
    return {str(t): int(n) for t, n in result.lengths.groupby("task", sort=False)["prompts"].max().items()}


def _trivial(result: EvictionResult) -> str:
    t = result.config["trivial"]
    return f"the first {t['sinks']} and the last {t['window']} positions"


def _said(outcome: str) -> str:
    text = {**OUTCOMES, **FORCED_OUTCOMES}[outcome]
    return f"{text[0].upper()}{text[1:]}."
