"""The report of an eviction study."""

from __future__ import annotations

import pandas as pd

from sglang_probe.paths import BUILT_IN_MODELS
from sglang_probe.report.figures import Figure, dots, panel_lines
from sglang_probe.report.numbers import format_interval, format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.evict.grid import BASELINE
from sglang_probe.studies.evict.likelihoods import FORCED_OUTCOMES
from sglang_probe.studies.evict.offline_page import TESTED, controls, equal_terms, heads, mass, needed
from sglang_probe.studies.evict.outcome import OUTCOMES
from sglang_probe.studies.evict.prediction_page import prediction
from sglang_probe.studies.evict.study import EvictionResult
from sglang_probe.studies.evict.summary import KINDS
from sglang_probe.studies.evict.tables import (
    PROTOCOLS,
    accuracy_table,
    best_predictors,
    budget_tables,
    budgets_of,
    gap_table,
    kind_of,
    metrics_tables,
    middle_budget,
    parameters_tables,
    stages_table,
    title_of,
)
from sglang_probe.studies.pages import facts, footer, only, row_of_largest


def eviction_page(result: EvictionResult) -> Page:
    """The page of one study: what each method keeps, what is generated from it, and which metric foretells it."""
    sections = [_curves(result), _accuracy(result), prediction(result)] if result.outcomes else []
    sections += [
        equal_terms(result),
        mass(result),
        needed(result),
        heads(result),
        controls(result),
        _likelihood(result),
        _parameters(result),
        _run(result),
    ]
    return Page(
        title=f"KV-cache eviction: {result.name}",
        answer=answer(result),
        picture=ranking(result),
        tiles=_tiles(result),
        lead=limits(result),
        facts=facts(
            result.manifest,
            ("tasks", ", ".join(f"{t} ({n} prompts)" for t, n in _prompts(result).items()) or "none"),
            ("budgets", ", ".join(budgets_of(result.offline)) + " of the positions that are compressed, per kv head"),
            ("always kept by every policy", _protected(result)),
        ),
        sections=[s for s in sections if s is not None],
        footer=footer(result.manifest, "Every number was measured in the runs of this study's folder."),
    )


def answer(result: EvictionResult) -> str:
    """Which methods are better than protected random, from the numbers alone."""
    ranked = _ranked(result)
    if not result.outcomes:
        best = row_of_largest(ranked, "mean")
        if best is None:
            return "Nothing was kept or generated that a method could be judged by."
        return (
            f"Of the attention that decoding gives to candidates, `{best['policy']}` keeps most: "
            f"{format_number(best['mean'], 'percent')} in {best['cell']} at a budget of {best['budget']}; nothing was "
            "generated from what is kept."
        )
    order = _order(ranked)
    if not len(order):
        return "No method was generated from."
    best, mean = order.index[0], format_number(order.iloc[0], "percent")
    random = only(ranked, kind="baseline")
    beside = f", {BASELINE} {format_number(random['mean'].mean(), 'percent')}" if len(random) else ""
    tested, better, worse = _tested(result)
    mine = only(tested, policy=best)
    return (
        f"Best on average is `{best}` ({title_of(result.outcome)} {mean}{beside}); at a family-wise 5 % it is better "
        f"than {BASELINE} in {len(only(better, policy=best))} of {len(mine)} cells (budget, task, protocol), and all "
        f"methods together are better in {len(better)} and worse in {len(worse)} of {len(tested)}."
    )


def limits(result: EvictionResult) -> str:
    """What the numbers do not tell."""
    if not result.outcomes:
        said = "Nothing was generated under a kept set here: these are statements about attention, not about answers."
        return " ".join([*result.caveats, said])
    told = [*result.caveats, "What this cannot tell:"]
    if _built_in(result):
        told.append("the model is small, its tasks are synthetic or short, and there is one training seed;")
    told.append(
        "intervals are over prompts alone, on one model and one engine. Rankings are those of these parameters, which "
        "are all listed below. Nothing is freed in the engine, so no number here is about speed."
    )
    return " ".join(told)


def _built_in(result: EvictionResult) -> bool:
    return result.config["model"] in BUILT_IN_MODELS


def _first(result: EvictionResult) -> pd.DataFrame:
    """Outcomes of the first way of decoding."""
    return next(iter(result.outcomes.values()), pd.DataFrame())


def _tested(result: EvictionResult) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Cells of methods that were tested against protected random, those that are better, and those that are worse."""
    part = only(_first(result), metric=result.outcome, kind="method")
    if part.empty:
        return part, part, part
    tested = part[part["p"].notna()]
    sure = tested[tested["p_holm"] <= 0.05]
    return tested, sure[sure["difference"] > 0], sure[sure["difference"] < 0]


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
    tested, better, _ = _tested(result)
    if len(tested):
        text = (
            f"cells (method, budget, task, protocol) with more {title_of(result.outcome)} than {BASELINE}, "
            "family-wise 5 %"
        )
        tiles.append(Tile("better than random", f"{len(better)} of {len(tested)}", text))
    best = row_of_largest(best_predictors(result), "spearman")
    if best is not None:
        interval = format_interval(best["low"], best["high"], "correlation")
        text = f"ranks methods most like {title_of(result.outcome)}: mean Spearman correlation {interval}"
        tiles.append(
            Tile(f"best predictor: {title_of(best['metric'])}", format_number(best["spearman"], "correlation"), text)
        )
    return tiles


def _ranked(result: EvictionResult) -> pd.DataFrame:
    """What methods are ranked by: the outcome where something was generated, else the non-trivial mass."""
    frame, metric = (_first(result), result.outcome) if result.outcomes else (result.offline, "nontrivial")
    part = only(frame, metric=metric, kind=["full", "baseline", "method"])
    part = part[part["mean"].notna()] if len(part) else part
    return part.assign(cell=part["task"] + ", " + part["protocol"].map(PROTOCOLS)) if len(part) else part


def _order(ranked: pd.DataFrame) -> pd.Series:
    """Mean of each method over the cells that all methods have, best first."""
    methods = only(ranked, kind="method")
    if methods.empty:
        return pd.Series(dtype=float)
    wide = methods.pivot_table(index="policy", columns=["cell", "budget"], values="mean", sort=False)
    shared = wide.loc[:, wide.notna().all()]
    means = (shared if len(shared.columns) else wide).mean(axis="columns")
    return means.sort_values(ascending=False, kind="stable")


def ranking(result: EvictionResult) -> Figure:
    """Every method, best first: a dot a budget with its interval, a panel a task and protocol, and two lines to compare
    with: protected random under each budget, and the full cache."""
    part = _ranked(result)
    methods, base = only(part, kind="method"), only(part, kind="baseline")
    what = title_of(result.outcome if result.outcomes else "nontrivial")
    references = pd.DataFrame()
    if len(methods):
        panels = pd.CategoricalDtype(list(dict.fromkeys(methods["cell"])), ordered=True)
        sizes = pd.CategoricalDtype([f"budget {b}" for b in budgets_of(methods)], ordered=True)
        methods = methods.assign(
            policy=pd.Categorical(methods["policy"], list(_order(part).index), ordered=True),
            cell=methods["cell"].astype(panels),
            budget=("budget " + methods["budget"]).astype(sizes),
        ).sort_values("policy")
        references = pd.concat(
            [
                base.assign(name=BASELINE, series="budget " + base["budget"], value=base["mean"]),
                only(part, kind="full").assign(name="full cache", series="", value=lambda d: d["mean"]),
            ]
        )
    return dots(
        methods,
        "policy",
        "budget",
        "mean",
        panel="cell",
        low="low",
        high="high",
        kind=kind_of(result.outcome if result.outcomes else "nontrivial"),
        references=references,
        title=f"Methods by {what}, best first",
        caption="Ordered by the mean over all panels and budgets. Horizontal lines: 95 % intervals over prompts. "
        f"Vertical lines: {BASELINE} under the budget of the same colour, and the full cache.",
        x_label=what,
    )


def _curves(result: EvictionResult) -> Section:
    """The outcome by budget, a panel per policy."""
    figures = []
    for decode, frame in result.outcomes.items():
        part = only(frame, metric=result.outcome, kind=["method", "baseline", "oracle"])
        tasks = dict.fromkeys(part["task"]) if len(part) else ()
        figures += [_curve(result, part[part["task"] == t], str(t), decode) for t in tasks]
    return Section(
        heading=f"{title_of(result.outcome).capitalize()} by budget",
        text=f"{_said(result.outcome)} Intervals are 95 % over prompts (Student's t, corrected for skewness). Oracles, "
        "marked so, read the future and bound what a kept set can do.",
        figures=figures,
        nothing="nothing was generated from a kept set",
    )


def _labelled(part: pd.DataFrame) -> pd.DataFrame:
    """With names of policies and protocols for figures."""
    names = part["policy"].where(part["kind"] != "oracle", "oracle: " + part["policy"])
    return part.assign(panel=names, series=part["protocol"].map(PROTOCOLS))


def _curve(result: EvictionResult, part: pd.DataFrame, task: str, decode: str) -> Figure:
    sizes = _shares(result, task)
    frame = _labelled(part).assign(x=part["budget"].map(sizes))
    # Of short prompts two budgets may be the same number of positions.
    frame = frame[frame["x"].notna()].drop_duplicates(["panel", "series", "x"])
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
        x_ticks={sizes[b]: b for b in budgets_of(frame)},
        log_x=True,
        kind=kind_of(result.outcome),
        title=f"{task}: {title_of(result.outcome)} by budget, {decode}",
        caption="One panel per policy. Dashed: protected random.",
        x_label="budget, share of the compressed positions",
    )


def _accuracy(result: EvictionResult) -> Section:
    tables = [accuracy_table(result)]
    budget = middle_budget(result)
    for decode, frame in result.outcomes.items():
        tables += _by_budget(frame, result.outcome, decode)
    if len(result.outcome_gaps):
        title = f"lost to the full cache, and share of {BASELINE}'s loss won back, budget {budget}"
        tables.append(gap_table(result.outcome_gaps, budget, title, "outcome_gaps"))
    others = [m for m in OUTCOMES if m != result.outcome]
    decode = next(iter(result.outcomes))
    kinds = [k for k in KINDS if k != "published"]
    part = only(_first(result), metric=others, budget=[budget, "1"], kind=kinds)
    tables += metrics_tables(part, f"other outcomes at budget {budget}", file=f"outcomes_{decode}")
    return Section(
        heading="What was generated",
        text=f"{TESTED} Oracle rows are bounds and are not tested.",
        tables=tables,
        notes=[f"**{title_of(k)}**: {text}." for k, text in OUTCOMES.items()],
        nothing="nothing was generated from a kept set",
    )


def _by_budget(frame: pd.DataFrame, metric: str, decode: str) -> list[Table]:
    """A table a task and protocol, budgets across."""
    said = f", {decode}: {title_of(metric)} by budget"
    return budget_tables(only(frame, metric=metric), metric, said, file=f"outcomes_{decode}")


def _likelihood(result: EvictionResult) -> Section | None:
    frame = result.outcomes.get("forced")
    if frame is None:
        return None
    return Section(
        heading="Likelihood of the reference, teacher-forced",
        text=f"{TESTED} Lower is better.",
        tables=_by_budget(frame, "nll", "forced"),
        notes=[f"**{title_of(k)}**: {text}." for k, text in FORCED_OUTCOMES.items()],
        nothing="no likelihood was recorded",
    )


def _parameters(result: EvictionResult) -> Section:
    return Section(
        heading="Every parameter",
        text="What is stated here is part of every result: rankings are those of these parameters.",
        tables=parameters_tables(result),
    )


def _run(result: EvictionResult) -> Section:
    tables = [stages_table(result)]
    if len(result.served):
        columns = [Column("task"), Column("decode", "decoding")]
        columns += [Column(c) for c in ("asked", "failed", "truncated", "kept_counts_asserted")]
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
    mine = only(result.lengths, task=task)
    return {str(b): float(s) for b, s in mine.groupby("budget")["share"].mean().items()} if len(mine) else {}


def _prompts(result: EvictionResult) -> dict[str, int]:
    if result.lengths.empty:
        return {}
    return {str(t): int(n) for t, n in result.lengths.groupby("task", sort=False)["prompts"].max().items()}


def _protected(result: EvictionResult) -> str:
    trivial = result.config["trivial"]
    sinks, recent = trivial["sinks"], trivial["window"]
    if (protect := result.config.get("protect")) is not None:
        sinks, recent = protect["sinks"], protect["recent"]
    return f"the first {sinks} and the last {recent} positions"


def _said(outcome: str) -> str:
    text = {**OUTCOMES, **FORCED_OUTCOMES}[outcome]
    return f"{text[0].upper()}{text[1:]}."
