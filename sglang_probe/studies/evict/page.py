"""The report of an eviction study."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import Figure, heatmap, panel_lines, panel_scatter
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Kind, Table, format_number
from sglang_probe.studies.evict.grid import BASELINE
from sglang_probe.studies.evict.judge import METRICS
from sglang_probe.studies.evict.likelihoods import FORCED_OUTCOMES
from sglang_probe.studies.evict.outcome import OUTCOMES
from sglang_probe.studies.evict.study import EvictionResult
from sglang_probe.studies.evict.tables import (
    PROTOCOLS,
    budgets_of,
    by_budget,
    gap_table,
    middle_budget,
    predictor_table,
    predictors_by_task,
    stages_table,
    wide,
)

_TESTED = (
    "Δ is the paired difference to protected random with its 95 % bootstrap interval over prompts; * marks a sign-flip "
    "p of at most 0.05 after Holm over all methods and budgets of the task and protocol."
)


def eviction_page(result: EvictionResult) -> Page:
    """The page of one study: what each method keeps, what is generated from it, and which metric foretells it."""
    m, v = result.manifest, result.manifest["versions"]
    sections = [_curves(result), _accuracy(result), _prediction(result)] if result.outcomes else []
    sections += [
        _mass(result),
        _heads(result),
        _controls(result),
        _likelihood(result),
        _parameters(result),
        _run(result),
    ]
    return Page(
        title=f"KV-cache eviction: {result.name}",
        lead=conclusions(result),
        tiles=_tiles(result),
        facts=[
            ("model", f"{m['model']['name']} ({m['model']['architecture']}, {m['model']['layers']} layers)"),
            ("engine", f"SGLang {v['sglang']}, torch {v['torch']}, rows in {m['rows_dtype']}"),
            ("tasks", ", ".join(f"{t} ({n} prompts)" for t, n in _prompts(result).items())),
            ("budgets", ", ".join(budgets_of(result.offline)) + " of the positions that are compressed, per kv head"),
            ("always kept by protected random", _trivial(result)),
            ("recorded", m["created"]),
        ],
        sections=[s for s in sections if s is not None],
        footer=f"sglang-probe {v['sglang-probe']}. Every number was measured in the runs of this study's folder.",
    )


def conclusions(result: EvictionResult) -> str:
    """What can and what cannot be concluded, from the numbers alone."""
    told = []
    if result.outcomes:
        decode = next(iter(result.outcomes))
        frame = result.outcomes[decode]
        part = frame[(frame["metric"] == result.outcome) & (frame["kind"] == "method")]
        tested = part[part["p"].notna()]
        better = tested[(tested["p_holm"] <= 0.05) & (tested["difference"] > 0)]
        worse = tested[(tested["p_holm"] <= 0.05) & (tested["difference"] < 0)]
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
        best = predictor_table(result)[0].iloc[0]
        told.append(
            f"The offline metric that ranks methods most like {result.outcome} is `{best['metric']}` (mean Spearman "
            f"{best['spearman']:.2f}, {best['low']:.2f} to {best['high']:.2f})."
        )
    told.append(
        "\n\nWhat this cannot tell: the model is small, its tasks are synthetic or short, and there is one training "
        "seed and one engine; intervals are over prompts alone. Rankings are those of these parameters, which are all "
        "listed below. Nothing is freed in the engine, so no number here is about speed."
        if result.outcomes
        else "\n\nNothing was generated under a kept set here: these are statements about attention, not about answers."
    )
    return " ".join(told)


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
    tiles.append(
        Tile(
            "kept counts",
            format_number(result.asserted),
            "selections of a request whose number of entries was asserted",
        )
    )
    if len(result.predictors):
        best = predictor_table(result)[0].iloc[0]
        tiles.append(Tile("best predictor", str(best["metric"]), f"mean Spearman {best['spearman']:.2f}"))
    return tiles


def _curves(result: EvictionResult) -> Section:
    """Accuracy by budget, a panel per method."""
    figures = []
    for decode, frame in result.outcomes.items():
        part = frame[(frame["metric"] == result.outcome) & frame["kind"].isin(["method", "baseline", "oracle"])]
        figures += [_curve(result, part[part["task"] == t], str(t), decode) for t in dict.fromkeys(part["task"])]
    return Section(
        heading=f"{result.outcome.capitalize()} by budget",
        text=f"{_said(result.outcome)} One panel per policy, with 95 % intervals over prompts; protected random is "
        "drawn dashed behind each. Oracles, marked so, read the future and bound what a kept set can do.",
        figures=figures,
    )


def _curve(result: EvictionResult, part: pd.DataFrame, task: str, decode: str) -> Figure:
    sizes = _shares(result, task)
    frame = part.assign(
        panel=part["policy"].where(part["kind"] != "oracle", "oracle: " + part["policy"]),
        series=part["protocol"].map(PROTOCOLS),
        x=part["budget"].map(sizes),
    )
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
        title=f"{task}: {result.outcome}, {decode}",
        x_label="budget, share of the compressed positions",
    )


def _accuracy(result: EvictionResult) -> Section:
    tables = []
    for decode, frame in result.outcomes.items():
        if result.outcome not in set(frame["metric"]):
            continue
        for task, protocol in frame[["task", "protocol"]].drop_duplicates().itertuples(index=False, name=None):
            table = by_budget(frame, task, protocol, result.outcome)
            tables.append(Table(table, f"{task}, {PROTOCOLS[protocol]}, {decode}: {result.outcome}", _percent(table)))
    if len(result.outcome_gaps):
        title = f"lost to the full cache, and share of protected random's loss won back, budget {middle_budget(result)}"
        table = gap_table(result.outcome_gaps, middle_budget(result))
        tables.append(Table(table, title, {"gap": "decimal"}))
    others = [m for m in OUTCOMES if m != result.outcome]
    first = next(iter(result.outcomes.values()))
    part = first[(first["metric"].isin(others)) & (first["budget"].isin([middle_budget(result), "1"]))]
    tables.append(Table(wide(part), f"other outcomes at budget {middle_budget(result)}"))
    return Section(
        heading="What was generated",
        text=f"{_TESTED} Oracle rows are bounds and are not tested.",
        tables=tables,
        notes=[f"`{k}`: {text}." for k, text in OUTCOMES.items()],
    )


def _prediction(result: EvictionResult) -> Section | None:
    if not len(result.predictors):
        return None
    frame, title = predictor_table(result)
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
    numbers: dict[str, Kind] = dict.fromkeys(map(str, by_task.columns[1:]), "decimal")
    return Section(
        heading=f"Which metric predicts {result.outcome}?",
        text="Within each task, protocol and budget, methods and protected random are ranked by the metric and by "
        "what was generated; Spearman's correlations are averaged over these cells. Metrics that are better when low "
        "are turned around. Oracles are left out, and so are per-step selections, which were not generated from. "
        "Intervals draw prompts with replacement, the same prompts for metric and outcome.",
        figures=figures,
        tables=[
            Table(frame, title, dict.fromkeys(["spearman", "low", "high"], "decimal")),
            Table(by_task, "by task and protocol", numbers),
        ],
        notes=[f"`{k}`: {METRICS[k]}." for k in frame["metric"] if k in METRICS],
    )


def _mass(result: EvictionResult) -> Section:
    tables = []
    cells = result.offline[["task", "protocol"]].drop_duplicates().itertuples(index=False, name=None)
    for task, protocol in cells:
        table = by_budget(result.offline, task, protocol, "nontrivial", kinds=("baseline", "method", "oracle"))
        tables.append(Table(table, f"{task}, {PROTOCOLS[protocol]}: non-trivial mass recall", _percent(table)))
    budget = middle_budget(result)
    part = result.offline[result.offline["budget"] == budget]
    part = part[part["metric"].isin(METRICS) & part["kind"].isin(["baseline", "method", "oracle"])]
    tables.append(Table(wide(part), f"all metrics, budget {budget}"))
    if "chance" in part and part["chance"].notna().any():
        levels = wide(part[part["chance"].notna()], "chance")
        tables.append(Table(levels, f"their chance levels, budget {budget}, exact"))
    if len(result.mass_gaps):
        title = f"prompt mass: regret to static_mean, and gap to it that is closed, budget {budget}"
        tables.append(Table(gap_table(result.mass_gaps, budget), title, {"gap": "decimal"}))
    return Section(
        heading="Offline: what is kept of the attention",
        text=f"Judged on the full-cache run's own decode steps. {_TESTED} Adaptive budgets, per-step selections and "
        "another always-kept set than the baseline's change how many candidates a policy keeps; the chance table "
        "shows what that alone gives.",
        tables=tables,
        notes=[f"`{k}`: {text}." for k, text in METRICS.items()],
    )


def _heads(result: EvictionResult) -> Section:
    budget = middle_budget(result)
    part = result.heads[(result.heads["budget"] == budget) & result.heads["kind"].isin(["baseline", "method"])]
    part = part.assign(where="L" + part["layer"].astype(str) + " H" + part["head"].astype(str))
    figures = [
        heatmap(
            mine,
            "policy",
            "where",
            "recall",
            title=f"{task}, {PROTOCOLS[str(protocol)]}: non-trivial mass recall by layer and head, budget {budget}",
            column_label="layer and query head",
            missing="no mass",
        )
        for (task, protocol), mine in part.groupby(["task", "protocol"], sort=False)
    ]
    return Section(
        heading="Where it is lost: layers and heads",
        text="Sums over prompts and steps. Heads that look at the last positions only have little mass outside the "
        "trivial set; a method may lose all of theirs and no answer.",
        figures=figures,
    )


def _controls(result: EvictionResult) -> Section | None:
    part = result.offline[result.offline["metric"] == "nontrivial"]
    names = set(part.loc[part["kind"] == "control", "policy"])
    if not names:
        return None
    sources = {n.split(": ")[0] for n in names}
    rows = part[part["policy"].isin(names | sources)].sort_values(["task", "protocol", "policy"], kind="stable")
    columns = ["task", "protocol", "budget", "policy", "mean", "low", "high", "chance"]
    kinds: dict[str, Kind] = dict.fromkeys(columns[4:], "percent")
    return Section(
        heading="Negative controls",
        text="Methods fed with what must not help: keys in another order, the queries of another request, queries "
        "from the middle of the prompt in place of the last ones. What a method owes to the thing that was spoiled is "
        "the drop from its own row; without any of it, its non-trivial mass recall is at the chance level beside it. "
        "A method that another request's queries serve as well as its own does not read this request's question: it "
        "has found places that all queries prefer.",
        tables=[Table(rows[columns], "non-trivial mass recall", kinds)],
    )


def _likelihood(result: EvictionResult) -> Section | None:
    frame = result.outcomes.get("forced")
    if frame is None:
        return None
    tables = []
    for task, protocol in frame[["task", "protocol"]].drop_duplicates().itertuples(index=False, name=None):
        table = by_budget(frame, task, protocol, "nll")
        numbers: dict[str, Kind] = dict.fromkeys(budgets_of(result.offline), "decimal")
        tables.append(Table(table, f"{task}, {PROTOCOLS[protocol]}: nll, nats per token; lower is better", numbers))
    return Section(
        heading="Likelihood of the reference, teacher-forced",
        text=_TESTED,
        tables=tables,
        notes=[f"`{k}`: {text}." for k, text in FORCED_OUTCOMES.items()],
    )


def _parameters(result: EvictionResult) -> Section:
    return Section(
        heading="Every parameter",
        text="Window, pooling, group reduction and always-kept set move results by more than many methods differ.",
        tables=[
            Table(result.policies, "policies"),
            Table(result.lengths, "budgets in positions", {"share": "percent"}),
        ],
    )


def _run(result: EvictionResult) -> Section:
    tables = [Table(stages_table(result), "wall time, seconds", {"s": "decimal"})]
    if len(result.served):
        tables.append(Table(result.served, "requests in the engine"))
    if len(result.excluded):
        tables.append(Table(result.excluded, "selections that were left out"))
    return Section(heading="The run", tables=tables)


def _percent(table: pd.DataFrame) -> dict[str, Kind]:
    return {str(c): "percent" for c in table.columns[2:] if not str(c).startswith("Δ")}


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
