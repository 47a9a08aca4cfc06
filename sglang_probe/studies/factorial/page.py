"""The report of a factorial study."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import Figure, grouped_bars, heatmap
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table, format_number
from sglang_probe.studies.factorial import cells
from sglang_probe.studies.factorial.evicted import OUTCOMES
from sglang_probe.studies.factorial.outcomes import COSINES
from sglang_probe.studies.factorial.study import (
    BASELINES,
    DIFFERENT_CONTENTS,
    DIFFERENT_POSITIONS,
    SAME_CONTENTS,
    FactorialResult,
)
from sglang_probe.studies.pages import facts, footer, proof
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
_DESIGN = (cells.RESAMPLED, cells.FILLER, cells.ZERO)
"""Same content, different content and different position of the effects that are shown first."""


_MOST_ROWS = 30
"""A longer table by layer is folded away."""


def factorial_page(result: FactorialResult) -> Page:
    """The page of one study: does it matter what pseudo tokens say, or where they are said to stand?"""
    o = result.options
    shown = effects_of(result, *_DESIGN, layer=ALL).set_index(["outcome", "effect"])
    mass = f"mass@{o.budgets[0]:g}"
    tiles = [
        Tile(
            _title(outcome),
            " / ".join(_signed(shown.loc[(outcome, effect), "value"]) for effect in ("content", "position")),
            "effect of content / of position, a second sample against filler, true positions against 0, 1, ...; not "
            "comparable in size",
        )
        for outcome in ("post", "pre_centred", mass)
    ]
    lead = (
        f"{result.prompts} prompts, each decoded for real and followed by {o.pseudo_tokens} pseudo tokens of "
        f"{len(cells.CONTENTS)} contents at {len(cells.POSITIONS)} RoPE positions. The pseudo tokens ran through the "
        f"same engine after the prompt, {format_number(result.reused, 'percent')} of whose positions came from the "
        "prefix cache; what they can attend to is the same in every cell, only the rotation differs."
    )
    return Page(
        title=f"Content by position: {result.name}",
        lead=lead,
        tiles=tiles,
        facts=facts(
            result.manifest,
            ("always kept, never counted", f"{o.sinks} first and {o.window} last prompt positions"),
        ),
        sections=[
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


def cosines_table(result: FactorialResult) -> Table:
    """Published cosines and ours, with the effects computed from the four cells."""
    four = [Column(c, kind="decimal") for c in ("SC&SP", "DC&SP", "SC&DP", "DC&DP")]
    effects = [Column(c, kind="signed") for c in ("content", "position", "interaction")]
    frame = result.table.assign(outcome=result.table["outcome"].map(_TITLES))
    columns = [Column("source"), Column("outcome", "cosine"), *effects, *four]
    return Table(frame, "Cosine to the true decode queries, published and here", columns=columns)


def effects_of(result: FactorialResult, same: str, different: str, position: str, *, layer: str) -> pd.DataFrame:
    """Effects of one 2x2 design in one layer, or in all."""
    e = result.effects
    chosen = (e["same"] == same) & (e["different"] == different) & (e["position"] == position) & (e["layer"] == layer)
    return e[chosen].drop(columns=["same", "different", "position", "layer"])


def _dapq(result: FactorialResult) -> Section:
    return Section(
        heading="In DapQ's layout",
        text="Cosine of pseudo queries to the decode queries of the same number. S same, D different; C content, P "
        "position. Different content is filler, the different positions are 0, 1, 2, ...; effects are computed from "
        "the four cells, also for the published ones.\n\n" + TAUTOLOGIES,
        tables=[cosines_table(result)],
        notes=[
            "Published: arXiv 2603.11564v1, tables 1, 5 and 6; aggregation over layers and heads is not stated there. "
            "The identity row is not exactly 1 here: the true tokens were decoded once and prefilled once, and the "
            "difference is the engine's numerics, which is the floor of every cosine in this report."
        ],
    )


def _effects(result: FactorialResult) -> Section:
    first = effects_of(result, *_DESIGN, layer=ALL)
    order = [c for c in (*COSINES, *_ordered(result)) if c in set(first["outcome"])]
    figure = grouped_bars(
        _in_order(first[first["effect"] != "interaction"], order),
        "outcome",
        "effect",
        "value",
        low="value_low",
        high="value_high",
        title="Main effects, from a second sample to filler and from the true positions to 0, 1, ...",
        caption="95 % intervals over prompts. For output error and excess nats, a negative effect is better.",
        kind="decimal",
    )
    first_budget = f"@{result.options.budgets[0]:g}"
    columns = ["post", "pre_centred", *(x for x in order if x.endswith(first_budget) or x in OUTCOMES)]
    others = [
        {
            "content": f"{same} or {different}",
            "position": f"true or {position}",
            **_pairs(effects_of(result, same, different, position, layer=ALL), columns),
        }
        for same in SAME_CONTENTS
        for different in DIFFERENT_CONTENTS
        for position in DIFFERENT_POSITIONS
    ]
    return Section(
        heading="What matters, by outcome",
        text="Content effect: half of (same - different at the true positions) + (same - different at the other ones); "
        "position effect likewise. **The two are not to be ranked.** How large an effect is depends on how far apart "
        "its two levels are, and nothing makes random tokens as far from a second sample as positions 0, 1, ... are "
        "from the true ones: with a mild shift content cannot lose, and with a large one position cannot. Compare "
        "designs that share one contrast. Cosines are averages over all heads; mass and output error are what an "
        "eviction would be judged by.",
        figures=[figure],
        tables=[Table(pd.DataFrame(others), "All designs: effect of content / effect of position", long=True)],
    )


def _importance(result: FactorialResult) -> Section:
    figures: list[Figure] = []
    at = result.cells[result.cells["layer"] == ALL]
    for outcome in _ordered(result):
        part = at[(at["outcome"] == outcome) & (at["content"] != "baseline")]
        figures.append(
            heatmap(
                part.assign(position="at " + part["position"]),
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
    )


def _layers(result: FactorialResult) -> Section:
    frames = [
        effects_of(result, *_DESIGN, layer=str(layer)).assign(layer=f"layer {layer}")
        for layer in sorted({x for x in result.effects["layer"] if x != ALL}, key=int)
    ]
    part = pd.concat(frames)
    outcomes = ["post", "pre_centred", *(x for x in _ordered(result) if x.startswith(("mass", "output_error")))]
    part = part[part["outcome"].isin(outcomes) & (part["effect"] != "interaction")]
    values = part.assign(outcome=part["outcome"].map(_title)).pivot(
        index=["layer", "outcome"], columns="effect", values=["value", "value_low", "value_high"]
    )
    names = {"value": "", "value_low": "_low", "value_high": "_high"}
    values.columns = [f"{effect}{names[what]}" for what, effect in values.columns]
    columns = [Column("layer"), Column("outcome")]
    columns += [
        Column(e, f"effect of {e}, 95 %", "signed", bounds=(f"{e}_low", f"{e}_high")) for e in ("content", "position")
    ]
    return Section(
        heading="By layer",
        text="A mean over layers can hide heads that look back by position and heads that look back by content.",
        tables=[
            Table(
                values.reset_index(),
                "Main effects by layer, intervals over prompts",
                columns=columns,
                long=len(values) > _MOST_ROWS,
            )
        ],
    )


def _all(result: FactorialResult) -> Section:
    at = result.cells[result.cells["layer"] == ALL]
    wide = at.pivot_table(index=["content", "position"], columns="outcome", values="value", sort=False).reset_index()
    columns = [Column("content"), Column("position")]
    columns += [Column(x, _title(x), "decimal") for x in wide.columns[2:]]
    return Section(
        heading="Every cell", tables=[Table(wide, "Means over prompts, layers and heads", columns=columns, long=True)]
    )


def _ordered(result: FactorialResult) -> list[str]:
    budgets = [f"{b:g}" for b in result.options.budgets]
    names = ["spearman", *(f"{k}@{b}" for k in ("overlap", "mass", "output_error") for b in budgets), *OUTCOMES]
    return [x for x in names if x in set(result.cells["outcome"])]


def _title(outcome: str) -> str:
    name, _, budget = outcome.partition("@")
    return _TITLES[name] + (f", {float(budget):.3g} of the prompt kept" if budget else "")


def _in_order(frame: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    names = [_title(x) for x in order]
    titled = frame.assign(outcome=pd.Categorical(frame["outcome"].map(_title), names, ordered=True))
    return titled.sort_values(["outcome", "effect"])


def _baselines(at: pd.DataFrame, outcome: str) -> str:
    part = at[(at["outcome"] == outcome) & (at["content"] == "baseline")].set_index("position")["value"]
    return "; ".join(f"{BASELINES[k]} {format_number(part[k], 'decimal')}" for k in BASELINES if k in part) + "."


def _pairs(effects: pd.DataFrame, outcomes: list[str]) -> dict[str, str]:
    """Both main effects of each outcome, as text."""
    value = effects.set_index(["outcome", "effect"])["value"]
    return {
        _title(x): " / ".join(_signed(value[x, effect]) for effect in ("content", "position"))
        for x in outcomes
        if (x, "content") in value
    }


def _signed(x: float) -> str:
    return f"{x:+.3f}"
