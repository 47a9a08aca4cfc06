"""The report of a factorial study."""

from __future__ import annotations

import math

import pandas as pd

from sglang_probe.report.figures import Figure, heatmap, panel_lines
from sglang_probe.report.numbers import MISSING, format_number
from sglang_probe.report.page import Page, Section
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.factorial import cells
from sglang_probe.studies.factorial.distances import CONTENT, POSITION
from sglang_probe.studies.factorial.evicted import OUTCOMES
from sglang_probe.studies.factorial.outcomes import COSINES
from sglang_probe.studies.factorial.study import (
    BASELINES,
    DIFFERENT_CONTENTS,
    DIFFERENT_POSITIONS,
    SAME_CONTENTS,
    FactorialResult,
)
from sglang_probe.studies.pages import facts, footer, only, proof
from sglang_probe.studies.query_drift.summary import ALL
from sglang_probe.studies.query_drift.tautologies import TAUTOLOGIES

_TITLES = {
    "post": "cosine post-RoPE",
    "pre": "cosine pre-RoPE",
    "pre_centred": "cosine pre-RoPE, centred",
    "spearman": "rank correlation of importance",
    "overlap": "overlap of kept sets",
    "mass": "non-trivial mass",
    "output_error": "output error",
    "agreement": "same token after eviction",
    "nll": "excess nats per token after eviction",
}
CONTENTS = {
    cells.REAL: "the true continuation",
    cells.SHIFTED: f"the same, up to {cells.LATER} tokens later",
    cells.RESAMPLED: "a second sample",
    cells.OTHER: "another prompt's continuation",
    cells.PROMPT: "ends of the prompt",
    cells.FILLER: "filler",
    cells.RANDOM: "random tokens",
}
POSITIONS = {cells.TRUE: "true positions", **{p: f"{n} further" for p, n in cells.SHIFTS.items() if n}}
POSITIONS[cells.ZERO] = "0, 1, ..."
_DESIGN = (cells.RESAMPLED, cells.FILLER, cells.ZERO)
"""Same content, different content and different position of the effects that are shown first."""


_CURVES = {CONTENT: "content, at true positions", POSITION: "position, of the true tokens"}

_MOST_ROWS = 30
"""A longer table by layer is folded away."""


def factorial_page(result: FactorialResult) -> Page:
    """The page of one study: does it matter what pseudo tokens say, or where they are said to stand?"""
    o = result.options
    mass = f"mass@{o.budgets[0]:g}"
    return Page(
        title=f"Content by position: {result.name}",
        answer=_answer(result, mass),
        picture=_picture(result),
        tiles=[],
        lead=f"{format_number(result.prompts)} prompts, each decoded for real and followed by {o.pseudo_tokens} pseudo "
        f"tokens of {len(cells.CONTENTS)} contents at {len(cells.POSITIONS)} RoPE positions. The pseudo tokens ran "
        f"through the same engine after the prompt, {format_number(result.reused, 'percent')} of whose positions came "
        "from the prefix cache; what they can attend to is the same in every cell, only the rotation differs.",
        facts=facts(
            result.manifest,
            ("always kept, never counted", f"{o.sinks} first and {o.window} last prompt positions"),
        ),
        sections=[
            _grid(result),
            _effects(result),
            _dapq(result),
            _importance(result),
            _layers(result),
            _all(result),
            proof(result.checks),
        ],
        footer=footer(
            result.manifest, "Every number was measured in the runs named here, except those marked as published."
        ),
    )


def _curve(result: FactorialResult, outcome: str, curve: str) -> pd.DataFrame:
    return only(result.curves, layer=ALL, outcome=outcome, curve=curve)


def _answer(result: FactorialResult, mass: str) -> str:
    """What the share falls to along each curve, and how far that is."""
    ends = []
    for curve, names, what in ((CONTENT, CONTENTS, "what they say"), (POSITION, POSITIONS, "where they stand")):
        part = _curve(result, mass, curve)
        part = part[part["value"].notna()] if len(part) else part
        if not len(part):
            return "Neither content nor position can be judged: no cell was measured."
        last = part.iloc[-1]
        ends.append(
            f"{format_number(last['value'], 'percent')} along {what} ({names.get(last['level'], last['level'])}, "
            f"distance {format_number(last['distance'], 'decimal')})"
        )
        first = part.iloc[0]
    return (
        f"{_title(mass).capitalize()}: {format_number(first['value'], 'percent')} by the true tokens at their true "
        f"positions, and at the farthest level {ends[0]} and {ends[1]}. Distance is one minus the cosine of their "
        "queries to the true ones, after RoPE; the two are not to be ranked, because the levels were chosen."
    )


def cosines_table(result: FactorialResult) -> Table:
    """Published cosines and ours, with the effects computed from the four cells."""
    four = [Column(c, kind="decimal") for c in ("SC&SP", "DC&SP", "SC&DP", "DC&DP")]
    effects = [Column(c, kind="signed") for c in ("content", "position", "interaction")]
    frame = result.table
    frame = frame.assign(outcome=frame["outcome"].map(_TITLES)) if len(frame) else frame
    columns = [Column("source"), Column("outcome", "cosine"), *effects, *four]
    return Table(frame, "Cosine to the true decode queries, published and here", columns=columns)


def effects_of(result: FactorialResult, same: str, different: str, position: str, *, layer: str) -> pd.DataFrame:
    """Effects of one 2x2 design in one layer, or in all."""
    chosen = only(result.effects, same=same, different=different, position=position, layer=layer)
    return chosen.drop(columns=["same", "different", "position", "layer"], errors="ignore")


def _dapq(result: FactorialResult) -> Section:
    return Section(
        heading="In DapQ's layout",
        text="Cosine of pseudo queries to the decode queries of the same number. S same, D different; C content, P "
        "position. Different content is filler, the different positions are 0, 1, 2, ...; effects are computed from "
        "the four cells, also for the published ones.\n\n" + TAUTOLOGIES,
        tables=[cosines_table(result)],
        notes=[
            "Published: arXiv 2603.11564v1, tables 1, 5 and 6; aggregation over layers and heads is not stated there. "
            "In the identity row the true tokens were decoded once and prefilled once: what it misses to 1 is the "
            "engine's numerics, the floor of every cosine in this report."
        ],
    )


def _picture(result: FactorialResult) -> Figure:
    """Outcomes over the measured distance, a curve for contents and one for positions."""
    part = only(result.curves, layer=ALL)
    if len(part):
        order = [x for x in _ordered(result) if x in set(part["outcome"]) and x != "nll"]
        part = only(part, outcome=order)
        panels = pd.CategoricalDtype([_title(x) for x in order], ordered=True)
        part = part.assign(panel=part["outcome"].map(_title).astype(panels), series=part["curve"].map(_CURVES))
        part = part.sort_values(["panel", "series", "distance"], kind="stable")
        part = part.drop_duplicates(["panel", "series", "distance"])
    return panel_lines(
        part,
        "panel",
        "distance",
        "value",
        "series",
        low="value_low",
        high="value_high",
        kind="decimal",
        title="What pseudo queries find, over how far they are from the true ones",
        caption="A point is a content at the true positions, or a position of the true tokens. Distance: one minus the "
        "cosine after RoPE. Bands are 95 % intervals over prompts. Of the output error less is better.",
        x_label="distance of the queries",
    )


def _grid(result: FactorialResult) -> Section:
    """The levels of each curve with their distances."""
    mass = f"mass@{result.options.budgets[0]:g}"
    rows = []
    for curve, names in ((CONTENT, CONTENTS), (POSITION, POSITIONS)):
        part = _curve(result, mass, curve)
        rows.append(part.assign(level=part["level"].map(names), curve=_CURVES[curve]) if len(part) else part)
    columns = [
        Column("curve", "what moves"),
        Column("level"),
        Column("distance", "distance of the queries", "decimal"),
        Column("tokens", "positions further", "integer"),
        Column("value", f"{_title(mass)}, 95 %", "percent", bounds=("value_low", "value_high")),
    ]
    layers = only(result.curves, outcome=mass)
    layers = layers[layers["layer"] != ALL] if len(layers) else layers
    if len(layers):
        named = {**CONTENTS, **POSITIONS}
        layers = layers.assign(level=layers["level"].map(named), curve=layers["curve"].map(_CURVES))
    return Section(
        heading="A grid of distances",
        text="Contents have no scale, and a position of 8 further cannot be held against another sentence. So both are "
        "put on one that is measured: how far the queries are from the true ones, after RoPE. Along one curve the "
        "content changes and positions are true; along the other the position changes and the tokens are true. Where "
        "the curves run together, an outcome asks how far the queries are and not what moved them. Every cell of the "
        "grid, both moved at once, is in the heat maps below.",
        tables=[
            Table(pd.concat(rows), "Levels of the grid", columns=columns),
            Table(
                layers,
                "Levels of the grid, by layer",
                columns=[Column("layer", kind="text"), *columns],
                long=True,
                file="curves",
            ),
        ],
        nothing="no cell was measured",
    )


def _effects(result: FactorialResult) -> Section:
    order = [*COSINES, *_ordered(result)]
    first_budget = f"@{result.options.budgets[0]:g}"
    columns = ["post", "pre_centred", *(x for x in order if x.endswith(first_budget) or x in OUTCOMES)]
    others = [
        {
            "content": f"{CONTENTS[same]} or {CONTENTS[different]}",
            "position": f"true or {POSITIONS[position]}",
            **_pairs(effects_of(result, same, different, position, layer=ALL), columns),
        }
        for same in SAME_CONTENTS
        for different in DIFFERENT_CONTENTS
        for position in DIFFERENT_POSITIONS
    ]
    return Section(
        heading="Two by two: effects by outcome",
        text="Content effect: half of (same - different at the true positions) + (same - different at the other ones); "
        "position effect likewise. **The two are not to be ranked.** How large an effect is depends on how far apart "
        "its two levels are, and nothing makes random tokens as far from a second sample as positions 0, 1, ... are "
        "from the true ones: with a mild shift content cannot lose, and with a large one position cannot. Compare "
        "designs that share one contrast. Cosines are averages over all heads; mass and output error are what an "
        "eviction would be judged by.",
        tables=[
            Table(
                pd.DataFrame(others if len(result.effects) else []),
                "All designs: effect of content / effect of position",
                long=True,
                file="effects",
            )
        ],
        nothing="no cell was measured",
    )


def _importance(result: FactorialResult) -> Section:
    figures: list[Figure] = []
    at = only(result.cells, layer=ALL)
    for outcome in _ordered(result):
        part = only(at, outcome=outcome, content=list(cells.CONTENTS))
        figures.append(
            heatmap(
                _named(part),
                "content",
                "position",
                "value",
                kind="decimal",
                title=_title(outcome),
                caption=_baselines(at, outcome),
            )
        )
    return Section(
        heading="Does a pseudo query find what decoding will read?",
        text="Importance is the attention that pseudo queries give to prompt positions, summed over them and averaged "
        "over the query heads of a group, with the pseudo tokens in the softmax, as DapQ has it. Truth is what the "
        "real decoding reads. Sinks and the last positions are kept in every set and counted in none. After an "
        "eviction, the real continuation is forced through the engine with the kept set; its first token comes from "
        "the full cache and does not count.",
        figures=figures,
        nothing="no cell was measured",
    )


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    """With contents and positions in words."""
    if frame.empty:
        return frame
    content = [
        BASELINES.get(p, p) if c == "baseline" else CONTENTS.get(c, c)
        for c, p in zip(frame["content"], frame["position"], strict=True)
    ]
    return frame.assign(content=content, position=[POSITIONS.get(p, MISSING) for p in frame["position"]])


def _layers(result: FactorialResult) -> Section:
    e = result.effects
    layers = sorted({x for x in e["layer"] if x != ALL}, key=int) if len(e) else []
    frames = [effects_of(result, *_DESIGN, layer=str(x)).assign(layer=f"layer {x}") for x in layers]
    values = pd.concat(frames) if frames else pd.DataFrame()
    outcomes = ["post", "pre_centred", *(x for x in _ordered(result) if x.startswith(("mass", "output_error")))]
    values = only(values, outcome=outcomes, effect=["content", "position"])
    if len(values):
        values = values.assign(outcome=values["outcome"].map(_title)).pivot(
            index=["layer", "outcome"],
            columns="effect",
            values=[c for c in ("value", "value_low", "value_high") if c in values],
        )
        names = {"value": "", "value_low": "_low", "value_high": "_high"}
        values.columns = pd.Index([f"{effect}{names[what]}" for what, effect in values.columns])
        values = values.assign(**{e: math.nan for e in ("content", "position") if e not in values})
        values = values.reset_index()
    columns = [Column("layer"), Column("outcome")]
    columns += [
        Column(e, f"effect of {e}, 95 %", "signed", bounds=(f"{e}_low", f"{e}_high")) for e in ("content", "position")
    ]
    return Section(
        heading="By layer",
        text="A mean over layers can hide heads that look back by position and heads that look back by content.",
        tables=[
            Table(
                values,
                "Main effects by layer, intervals over prompts",
                columns=columns,
                long=len(values) > _MOST_ROWS,
                file="effects",
            )
        ],
    )


def _all(result: FactorialResult) -> Section:
    wide = only(result.cells, layer=ALL)
    if len(wide):
        wide = wide.pivot_table(index=["content", "position"], columns="outcome", values="value", sort=False)
        wide = wide.reset_index()
    columns = [Column("content"), Column("position")]
    columns += [Column(x, _title(x), "decimal") for x in (wide.columns[2:] if len(wide) else ())]
    return Section(
        heading="Every cell",
        tables=[Table(_named(wide), "Means over prompts, layers and heads", columns=columns, long=True, file="means")],
        nothing="no cell was measured",
    )


def _ordered(result: FactorialResult) -> list[str]:
    budgets = [f"{b:g}" for b in result.options.budgets]
    names = ["spearman", *(f"{k}@{b}" for k in ("overlap", "mass", "output_error") for b in budgets), *OUTCOMES]
    there = set(result.cells["outcome"]) if len(result.cells) else set()
    return [x for x in names if x in there]


def _title(outcome: str) -> str:
    name, _, budget = outcome.partition("@")
    return _TITLES[name] + (f", {format_number(float(budget), 'percent')} kept" if budget else "")


def _baselines(at: pd.DataFrame, outcome: str) -> str:
    part = only(at, outcome=outcome, content="baseline").set_index("position")["value"]
    return "; ".join(f"{BASELINES[k]} {format_number(part[k], 'decimal')}" for k in BASELINES if k in part) + "."


def _pairs(effects: pd.DataFrame, outcomes: list[str]) -> dict[str, str]:
    """Both main effects of each outcome, as text."""
    value = effects.set_index(["outcome", "effect"]) if len(effects) else effects
    return {_title(x): _pair(value, x) for x in outcomes if (x, "content") in value.index}


def _pair(effects: pd.DataFrame, outcome: str) -> str:
    return " / ".join(format_number(effects.loc[(outcome, e), "value"], "signed") for e in ("content", "position"))
