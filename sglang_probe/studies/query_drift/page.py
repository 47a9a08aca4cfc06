"""The report of a drift study."""

from __future__ import annotations

import math

import pandas as pd

from sglang_probe.report.figures import Figure, heatmap, lines
from sglang_probe.report.numbers import Kind, format_interval, format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.pages import MANY_LAYERS, facts, footer, only, proof
from sglang_probe.studies.query_drift.layer_figures import (
    cosine_by_layer,
    excess_by_layer,
    folded_if_many,
    mass_by_layer,
    subspace_by_layer,
)
from sglang_probe.studies.query_drift.placebo import TEXT, TURN
from sglang_probe.studies.query_drift.reading import changes, horizon, importance, kept_mass
from sglang_probe.studies.query_drift.study import DriftResult
from sglang_probe.studies.query_drift.summary import ALL
from sglang_probe.studies.query_drift.tautologies import TAUTOLOGIES

COSINES = {
    "pre": "pre-RoPE",
    "pre_centred": "pre-RoPE, centred",
    "post": "post-RoPE",
    "null_post": "rotation alone",
}
NEAREST = {
    "pre_nearest": "pre-RoPE",
    "pre_centred_nearest": "pre-RoPE, centred",
    "post_nearest": "post-RoPE",
}


def drift_page(result: DriftResult) -> Page:
    """The page of one study: how far do decode queries leave the window that eviction scores with, and does it
    matter?"""
    o = result.options
    excess = only(result.found.excess, layer=ALL, kind="centred")
    excess = excess.sort_values("distance") if len(excess) else excess
    return Page(
        title=f"Query drift: {result.name}",
        answer=_answer(result),
        picture=kept_mass(result),
        tiles=[
            Tile(
                "excess drift, centred",
                format_number(excess["excess"].iloc[0] if len(excess) else None, "signed"),
                _reach(excess),
            )
        ],
        lead=f"{format_number(result.requests)} requests with prompts of {_between(result.lengths)} tokens and "
        f"{_between(result.steps)} decode steps. The window is the last {o.window} prompt positions. Decode queries "
        "are compared with it pre-RoPE and post-RoPE, raw and without the prompt's mean query, and every curve stands "
        "beside what would be seen without any drift of content.",
        facts=facts(
            result.manifest,
            ("layers", ", ".join(map(str, result.layers))),
            ("options", ", ".join(f"{k.replace('_', ' ')} {val}" for k, val in o.model_dump().items())),
            ("left out", "; ".join(f"{n} requests: {why}" for why, n in result.left_out.items()) or "nothing"),
        ),
        sections=[
            _cosines(result),
            _excess(result),
            _subspace(result),
            importance(result),
            *mass_by_layer(result),
            horizon(result),
            changes(result),
            _controls(result),
            _coverage(result),
            proof(result.checks),
        ],
        footer=footer(
            result.manifest, "Every number was measured in the run named here, except those marked as published."
        ),
    )


def _answer(result: DriftResult) -> str:
    """What the window's choice still holds at the last step, beside chance and recency."""
    recall = only(result.found.recall, layer=ALL)
    if recall.empty:
        return "Nothing can be said of what the window predicts: no step was measured."
    last = int(recall["step"].max())
    at = dict(zip(*(only(recall, step=last)[c] for c in ("policy", "value")), strict=True))
    window, random, recent = (format_number(at.get(p), "percent") for p in ("window", "random", "recency"))
    return (
        f"From step {last} on, {window} of the non-trivial attention mass is on what the prompt's last "
        f"{result.options.window} queries chose; random positions hold {random}, the most recent ones {recent}."
    )


def steps_table(result: DriftResult) -> Table:
    """Means over layers and heads by decode step."""
    steps = result.found.steps
    wide = only(steps, layer=ALL)
    if len(wide):
        wide = wide.pivot(index="metric", columns="step", values="value").reset_index()
    wide.columns = [str(c) for c in wide.columns]
    columns = [Column("metric"), *(Column(c, kind="decimal") for c in wide.columns[1:])]
    return Table(wide, f"{result.requests} requests: means by decode step (first of its bin)", columns=columns)


def _cosines(result: DriftResult) -> Section:
    steps = result.found.steps
    heads = _by_head(result)
    late = int(heads["late_step"].iloc[0]) if len(heads) else 0
    by_layer = only(steps, metric="pre_centred")
    by_layer = by_layer[by_layer["layer"] != ALL] if len(by_layer) else by_layer
    return Section(
        heading="Decode queries beside the window",
        text=TAUTOLOGIES,
        figures=[
            _curves(
                steps, COSINES, "Cosine to the mean window query", "Means over heads and layers; bands over prompts."
            ),
            _curves(
                steps,
                NEAREST,
                "Cosine to the nearest window query",
                "A nearest neighbour among many is near even where nothing is shared: compare with the controls below.",
            ),
            *_by_layer(result, by_layer),
            folded_if_many(
                result,
                heatmap(
                    heads,
                    "layer",
                    "head",
                    "pre_centred_late",
                    kind="decimal",
                    title=f"Centred pre-RoPE cosine from step {late} on, by head",
                    column_label="query head",
                    caption="Means over prompts. No single cell is tested.",
                ),
            ),
        ],
    )


def _by_layer(result: DriftResult, by_layer: pd.DataFrame) -> list[Figure]:
    """A curve a layer; of many layers a curve a bin of steps, with the layers on the axis."""
    if len(result.layers) > MANY_LAYERS:
        return [cosine_by_layer(by_layer)]
    return [
        lines(
            _layers_named(by_layer),
            "step",
            "value",
            "layer",
            low="value_low",
            high="value_high",
            log_x=True,
            title="Centred pre-RoPE cosine, by layer",
            x_label="decode step (first of its bin)",
            y_label="cosine",
        )
    ]


def _curves(steps: pd.DataFrame, names: dict[str, str], title: str, caption: str) -> Figure:
    part = only(steps, layer=ALL, metric=list(names))
    if len(part):
        part = part.assign(metric=pd.Categorical(part["metric"].map(names), list(names.values()), ordered=True))
        part = part.sort_values(["metric", "step"])
    return lines(
        part,
        "step",
        "value",
        "metric",
        low="value_low",
        high="value_high",
        log_x=True,
        title=title,
        caption=caption,
        x_label="decode step (first of its bin)",
        y_label="cosine",
    )


def _layers_named(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(layer="layer " + frame["layer"].astype(str)) if len(frame) else frame


def _by_head(result: DriftResult) -> pd.DataFrame:
    heads = _layers_named(result.found.maps)
    return heads.assign(head=heads["head"].astype(str)) if len(heads) else heads


def _excess(result: DriftResult) -> Section:
    part = only(result.found.excess, layer=ALL)
    part = part.sort_values(["kind", "distance"]) if len(part) else part
    layers = result.found.excess
    layers = layers[layers["layer"] != ALL] if len(layers) else layers
    centred = only(layers, kind="centred")
    if len(centred):
        centred = centred.assign(
            layer=centred["layer"].astype(int), distance="from " + centred["distance"].astype(str)
        ).sort_values("layer", kind="stable")
    return Section(
        heading="Is it decoding, or is it distance?",
        text="Excess drift: the mean pre-RoPE cosine of prompt queries a distance apart, minus that of window and "
        "decode queries equally far apart in the same request. 0 means that decode queries are no further from the "
        "window than prompt queries would be. **Placebo** is the same number at borders inside the prompt "
        f"({_borders(result)}), where nothing changes but the text: its mean, and the standard deviation of a single "
        "border within a document. **Beyond** is the excess beyond the document's own placebo mean, with its interval "
        "over documents; **p** asks how often a border that is drawn at random in every document would be as far from "
        "the mean of all borders, and **q** is p after Benjamini and Hochberg.",
        figures=[
            lines(
                part,
                "distance",
                "excess",
                "kind",
                low="excess_low",
                high="excess_high",
                log_x=True,
                title="Excess drift by distance",
                x_label="distance (start of its bin)",
                y_label="prompt cosine minus decode cosine",
                caption="Bands over prompts.",
            ),
            lines(
                centred,
                "layer",
                "beyond",
                "distance",
                low="beyond_low",
                high="beyond_high",
                title="Excess drift beyond placebo borders, centred, by layer",
                caption="A line a bin of distances. Bands over prompts.",
                x_label="layer",
                y_label="beyond placebo",
            ),
            folded_if_many(
                result,
                heatmap(
                    _by_head(result),
                    "layer",
                    "head",
                    "excess_centred",
                    kind="decimal",
                    title="Excess drift by head, centred, all distances",
                    column_label="query head",
                    caption="Weighted by pairs. Negative cells: decode queries are nearer than prompt queries as far "
                    "apart.",
                ),
            ),
            *excess_by_layer(result),
        ],
        tables=[
            Table(part, "Excess drift", columns=_EXCESS),
            Table(
                layers,
                "Excess drift, by layer",
                columns=[Column("layer", kind="text"), *_EXCESS],
                long=True,
                file="means_excess",
            ),
        ],
        nothing="no two queries are so far apart",
    )


def _subspace(result: DriftResult) -> Section:
    names = {
        "first": "first window of steps",
        "last": "last window of steps",
        "earlier": "null: the prompt window before",
        "split_half": "null: other half of the window",
        "random": "null: random directions",
    }
    wide = _layers_named(only(result.found.subspace, measure=list(names)))
    if len(wide):
        # Layers down: a model has more of them than there are kinds of queries.
        wide = wide.assign(queries=wide["measure"].map(names))
        wide = wide.pivot(index="layer", columns="queries", values="value").reindex(columns=list(names.values()))
        wide = wide.loc[[f"layer {i}" for i in result.layers if f"layer {i}" in wide.index]].reset_index()
    kinds: dict[str, Kind] = {str(c): "percent" for c in wide.columns if c != "layer"}
    return Section(
        heading="Do decode queries leave the window's directions?",
        text=f"The directions that hold {result.options.energy:.0%} of the window's energy (at most half as many as "
        "the window has queries), and how much of the energy of decode queries lies within them, centred and pre-RoPE. "
        "Half a window finds fewer directions than the whole, so that the split-half null is too low.",
        figures=subspace_by_layer(result, names),
        tables=[Table(wide, "Captured energy", kinds, long=len(wide) > MANY_LAYERS)],
        nothing="no subspace was found",
    )


def _controls(result: DriftResult) -> Section:
    wide = result.found.controls
    if len(wide):
        wide = wide.pivot_table(index=["layer", "control"], columns="measure", values="value", sort=False).reset_index()
    columns = [Column("layer"), Column("control"), *(Column(c, h, k) for c, (h, k) in _MEASURES.items() if c in wide)]
    return Section(
        heading="Negative controls",
        text="The same measures with something broken on purpose: the decode queries (and the scoring window) of "
        "another request, the prompt's first positions as the window, and keys that changed places before scoring. "
        "Shuffled keys must bring the kept mass to chance; if another request's queries do not, importance depends on "
        "the keys alone.",
        tables=[Table(wide, "Late steps", columns=columns, long=True, file="means_controls")],
        nothing="no control was run",
    )


def _coverage(result: DriftResult) -> Section:
    heading = "Which of these queries exist"
    if result.found.coverage.empty:
        return Section(heading=heading, text="Nothing to show, because no window was looked at.")
    c = result.found.coverage.iloc[0]
    text = (
        f"{int(c['whole_windows'])} of {int(c['requests'])} requests computed all queries of their window themselves; "
        f"{format_number(c['window_coverage'], 'percent')} of the window positions were computed."
    )
    if c["gathered"]:
        text += (
            " The others came from the prefix cache, where queries do not exist: they were gathered through lineage "
            "from the requests that computed them."
        )
    if c["cut_windows"]:
        text += (
            f" In the {int(c['cut_windows'])} requests with a cut window the mean centred cosine is "
            f"{format_number(c['cosine_with_lineage'], 'decimal')} with lineage"
        )
        own = c["cosine_of_own_queries"]
        text += (
            "."
            if own is None or math.isnan(own)
            else f", and {format_number(own, 'decimal')} from the queries alone that they computed themselves."
        )
    return Section(heading=heading, text=text)


_EXCESS = [
    Column("kind", "queries"),
    Column("distance", "distance from"),
    Column("excess", "excess, 95 % interval", "signed", bounds=("excess_low", "excess_high")),
    Column("placebo", "placebo (sd of one border)", "signed", beside="placebo_sd"),
    Column("beyond", "beyond placebo, 95 %", "signed", bounds=("beyond_low", "beyond_high")),
    Column("p", kind="decimal"),
    Column("q", kind="decimal"),
    Column("prompt", "prompt cosine", "decimal"),
    Column("decode", "decode cosine", "decimal"),
    Column("prompts"),
]
_MEASURES: dict[str, tuple[str, Kind]] = {
    "pre_centred": ("centred pre-RoPE cosine", "decimal"),
    "pre_centred_nearest": ("to the nearest window query", "decimal"),
    "js": ("Jensen-Shannon divergence, nats", "decimal"),
    "mass": ("kept non-trivial mass", "percent"),
    "mass_chance": ("chance", "percent"),
}


def _borders(result: DriftResult) -> str:
    """How many placebo borders there are, and where they lie."""
    rows = result.rows.get("placebo", pd.DataFrame())
    if not len(rows):
        return "none here: the prompts are too short"
    found = rows.drop_duplicates(["rid", "border"])["where"].value_counts()
    words = {TEXT: "at random places", TURN: "where earlier answers of the assistant begin"}
    return " and ".join(f"{format_number(int(n))} {words[str(where)]}" for where, n in found.items())


def _between(ends: tuple[int, int]) -> str:
    """`228`, or `128 to 228`."""
    low, high = ends
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _reach(excess: pd.DataFrame) -> str:
    """The interval and the distances of the tile's excess, and the excess at the farthest."""
    nothing = "0 means that decode queries differ by distance alone"
    if len(excess) < 2:
        return nothing
    nearest, farthest = excess.iloc[0], excess.iloc[-1]
    if pd.notna(nearest.get("placebo_sd")):
        nothing = (
            f"a border inside the prompt has {format_number(nearest['placebo'], 'signed')} on average, with a standard "
            f"deviation of {format_number(nearest['placebo_sd'], 'decimal')} of a single one; "
            f"p {format_number(nearest['p'], 'decimal')} against these"
        )
    near, far = (
        format_interval(row.get("excess_low"), row.get("excess_high"), "signed") for row in (nearest, farthest)
    )
    return (
        f"{near}, fewer than {int(excess['distance'].iloc[1])} positions apart; from {int(farthest['distance'])} on "
        f"{format_number(farthest['excess'], 'signed')} {far}. {nothing}"
    )
