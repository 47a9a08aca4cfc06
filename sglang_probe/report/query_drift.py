"""The report of a drift study."""

from __future__ import annotations

import math

import pandas as pd

from sglang_probe.report.figures import Figure, heatmap, lines
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Kind, Table, format_number
from sglang_probe.study.query_drift.study import DriftResult
from sglang_probe.study.query_drift.summary import ALL
from sglang_probe.study.query_drift.tautologies import TAUTOLOGIES

COSINES = {
    "pre": "before RoPE",
    "pre_centred": "before RoPE, centred",
    "post": "behind RoPE",
    "null_post": "rotation alone",
}
NEAREST = {
    "pre_nearest": "before RoPE",
    "pre_centred_nearest": "before RoPE, centred",
    "post_nearest": "behind RoPE",
}
SNAPKV_PUBLISHED = {128: 0.9463, 64: 0.9429, 32: 0.9508, 16: 0.9466, 8: 0.9416, 4: 0.9385, 2: 0.9332, 1: 0.8426}
DAPQ_PUBLISHED = {128: 0.9785, 64: 0.9747, 32: 0.9726, 16: 0.9713, 8: 0.9705, 4: 0.9644, 2: 0.9615, 1: 0.8768}
"""Cosine of window-averaged attention to that of the response, DapQ (arXiv 2603.11564v1), table 8."""


def drift_page(result: DriftResult) -> Page:
    """The page of one study: how far do decode queries leave the window that eviction scores with, and does it
    matter?"""
    m, f, o = result.manifest, result.found, result.options
    excess = f.excess[(f.excess["layer"] == ALL) & (f.excess["kind"] == "centred")].sort_values("distance")
    recall = f.recall[f.recall["layer"] == ALL]
    last = int(recall["step"].max())
    at_last = recall[recall["step"] == last].set_index("policy")
    lead = (
        f"{result.requests} requests with prompts of {result.lengths[0]:,} to {result.lengths[1]:,} tokens and "
        f"{result.steps[0]} to {result.steps[1]} decode steps. The window is the last {o.window} prompt positions. "
        f"Decode queries are compared with it before and behind RoPE, raw and without the prompt's mean query, and "
        f"every "
        "curve stands beside what would be seen without any drift of content."
    )
    tiles = [
        Tile(
            "excess drift, centred",
            _interval(excess.iloc[0], "excess") if len(excess) else "none",
            _reach(excess),
        ),
        Tile(
            "still predicted",
            format_number(at_last.loc["window", "value"], "percent"),
            f"of the non-trivial mass at step {last} is on what the window chose; at random "
            f"{format_number(at_last.loc['random', 'value'], 'percent')}, most recent "
            f"{format_number(at_last.loc['recency', 'value'], 'percent')}",
        ),
    ]
    v = m["versions"]
    return Page(
        title=f"Query drift: {result.name}",
        lead=lead,
        tiles=tiles,
        facts=[
            ("model", f"{m['model']['name']} ({m['model']['architecture']}, {m['model']['layers']} layers)"),
            ("layers", ", ".join(map(str, result.layers))),
            ("engine", f"SGLang {v['sglang']}, torch {v['torch']}"),
            ("rows in", str(m["rows_dtype"])),
            ("options", ", ".join(f"{k} {val}" for k, val in o.model_dump().items())),
            ("left out", "; ".join(f"{n} requests: {why}" for why, n in result.left_out.items()) or "nothing"),
            ("recorded", m["created"]),
        ],
        sections=[
            _cosines(result),
            _excess(result),
            _subspace(result),
            _importance(result),
            _horizon(result),
            _changes(result),
            _controls(result),
            _coverage(result),
            _proof(result),
        ],
        footer=f"sglang-probe {v['sglang-probe']}. Every number was measured in the run listed here, but published "
        f"ones.",
    )


def _cosines(result: DriftResult) -> Section:
    steps = result.found.steps
    heads = result.found.maps
    late = int(heads["late_step"].iloc[0])
    map_rows = heads.assign(layer="layer " + heads["layer"].astype(str), head=heads["head"].astype(str))
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
            lines(
                steps[(steps["metric"] == "pre_centred") & (steps["layer"] != ALL)].assign(
                    layer=lambda d: "layer " + d["layer"]
                ),
                "step",
                "value",
                "layer",
                low="value_low",
                high="value_high",
                log_x=True,
                title="Centred cosine before RoPE, by layer",
                x_label="decode step (first of its bin)",
                y_label="cosine",
            ),
            heatmap(
                map_rows,
                "layer",
                "head",
                "pre_centred_late",
                kind="decimal",
                title=f"Centred cosine before RoPE from step {late} on, by head",
                column_label="query head",
                caption="Means over prompts. No single cell is tested.",
            ),
        ],
    )


def _curves(steps: pd.DataFrame, names: dict[str, str], title: str, caption: str) -> Figure:
    part = steps[(steps["layer"] == ALL) & steps["metric"].isin(names)]
    part = part.assign(metric=pd.Categorical(part["metric"].map(names), list(names.values()), ordered=True))
    return lines(
        part.sort_values(["metric", "step"]),
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


def _excess(result: DriftResult) -> Section:
    f = result.found
    part = f.excess[f.excess["layer"] == ALL].sort_values(["kind", "distance"])
    heads = f.maps.assign(layer="layer " + f.maps["layer"].astype(str), head=f.maps["head"].astype(str))
    return Section(
        heading="Is it decoding, or is it distance?",
        text="Excess drift: the mean cosine before RoPE of prompt queries a distance apart, minus that of window and "
        "decode "
        "queries equally far apart in the same request. 0 means that decode queries are no further from the window "
        "than "
        "prompt queries would be.",
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
            heatmap(
                heads,
                "layer",
                "head",
                "excess_centred",
                kind="decimal",
                title="Excess drift by head, centred, all distances",
                column_label="query head",
                caption="Weighted by pairs. Negative cells: decode queries are nearer than prompt queries as far "
                "apart.",
            ),
        ],
        tables=[Table(part.drop(columns=["layer"]), "Excess drift", {})],
    )


def _subspace(result: DriftResult) -> Section:
    names = {
        "first": "first window of steps",
        "last": "last window of steps",
        "earlier": "null: the prompt window before",
        "split_half": "null: other half of the window",
        "random": "null: random directions",
    }
    part = result.found.subspace
    part = part[part["measure"].isin(names)]
    part = part.assign(queries=part["measure"].map(names), layer="layer " + part["layer"].astype(str))
    wide = part.pivot(index="queries", columns="layer", values="value").loc[list(names.values())].reset_index()
    kinds: dict[str, Kind] = {c: "percent" for c in wide.columns if c != "queries"}
    return Section(
        heading="Do decode queries leave the window's directions?",
        text=f"The directions that hold {result.options.energy:.0%} of the window's energy (at most half as many as "
        f"the "
        "window has queries), and how much of the energy of decode queries lies within them, centred and before RoPE. "
        "The "
        "halves of a window find fewer directions than the whole, so that this null is a low one.",
        tables=[Table(wide, "Captured energy", kinds)],
    )


def _importance(result: DriftResult) -> Section:
    f = result.found
    windows = f.windows.pivot(index="window", columns="measure", values="value").reset_index()
    windows = windows.assign(
        **{
            "SnapKV, published": windows["window"].map(SNAPKV_PUBLISHED),
            "DapQ, published": windows["window"].map(DAPQ_PUBLISHED),
        }
    ).rename(columns={"cosine": "window here", "without_sinks": "window here, sinks left out"})
    distances = {"js": "Jensen-Shannon divergence", "functional": "change of the logits"}
    part = f.steps[(f.steps["layer"] == ALL)]
    figures = [
        lines(
            part[part["metric"] == name],
            "step",
            "value",
            low="value_low",
            high="value_high",
            log_x=True,
            title=title,
            caption=caption,
            x_label="decode step (first of its bin)",
            y_label=y,
        )
        for name, title, y, caption in (
            (
                "js",
                "What the window reads beside what decoding reads",
                f"{distances['js']} in nats",
                "Over prompt positions that are neither sinks nor window; ln 2 is disjoint. Weights of a bin are "
                "summed.",
            ),
            (
                "functional",
                "Functional drift",
                distances["functional"],
                "Root mean square change of the logits over the prompt keys, to the mean window query; a change "
                "common to "
                "all keys is removed.",
            ),
        )
    ]
    return Section(
        heading="Does it change what is read?",
        figures=figures,
        tables=[
            Table(
                windows.sort_values("window", ascending=False),
                "Cosine of window-averaged attention to that of the whole response, in the layout of DapQ's table 8",
                {"window": "integer"},
            )
        ],
        notes=[
            "Published numbers: arXiv 2603.11564v1, table 8, other models and other prompts. A cosine of attention "
            "rows is "
            "ruled by sinks where a model has them."
        ],
    )


def _horizon(result: DriftResult) -> Section:
    f = result.found
    part = f.survival[f.survival["layer"] == ALL].assign(baseline=lambda d: "against " + d["baseline"])
    recall = f.recall[f.recall["layer"] == ALL]
    shown = f.horizon.assign(
        median=[_median(x) for x in f.horizon["median"]],
        interval=[
            f"{_median(a)} to {_median(b)}"
            for a, b in zip(f.horizon["median_low"], f.horizon["median_high"], strict=True)
        ],
    )
    columns = ["layer", "baseline", "requests", "failed", "failed_at_once", "median", "interval", "recall"]
    columns += ["baseline_recall", "half_life"]
    kinds: dict[str, Kind] = {"recall": "percent", "baseline_recall": "percent"}
    o = result.options
    return Section(
        heading="How long does the window predict?",
        text=f"The window keeps {o.budget:.0%} of the prompt (unpooled attention of its queries, sinks and window "
        f"included). "
        "Recall is the share of the attention mass on candidates (neither sinks nor window) that falls on kept ones. "
        "The "
        f"horizon ends at the first {o.run} steps in a row in which recall is no better than the baseline's; a "
        f"response that "
        "ends first is censored, not a failure (Kaplan and Meier). Half-lives are of the mean recall of requests that "
        "last as long as the longest; none is given where the curve does not come down to a limit.",
        figures=[
            lines(
                part,
                "step",
                "survival",
                "baseline",
                kind="percent",
                step=False,
                title="Requests whose window still predicts",
                x_label="decode step",
                y_label="survival",
                caption="Pooled over layers and heads.",
            ),
            lines(
                recall,
                "step",
                "value",
                "policy",
                low="value_low",
                high="value_high",
                kind="percent",
                log_x=True,
                title="Non-trivial mass that is kept",
                x_label="decode step (first of its bin)",
                y_label="share",
                caption="Only requests that reach the last step shown, so that late steps are not those of long "
                "responses.",
            ),
        ],
        tables=[Table(shown[columns], "Horizons in steps", kinds)],
        notes=[
            "Horizons are of requests; responses of one prompt family are not independent, and the interval ignores it."
        ],
    )


def _changes(result: DriftResult) -> Section:
    return Section(
        heading="Phase jumps",
        text="A CUSUM over the steps of each response finds the split at which attention over the prompt changes "
        "most; the "
        "same steps in random order give its null. `found` is the share of heads beyond their null, `shuffled` the "
        "same for "
        "responses whose steps were shuffled before (false alarms; `level` is expected), `agreement` the largest "
        "share of "
        "heads that change within one step of each other. Slow drift is found as well as a jump.",
        tables=[Table(result.found.changes, "Change points", {"level": "percent"})],
    )


def _controls(result: DriftResult) -> Section:
    wide = result.found.controls.pivot_table(index=["layer", "control"], columns="measure", values="value", sort=False)
    return Section(
        heading="Negative controls",
        text="The same measures with something broken on purpose: the decode queries (and the scoring window) of "
        "another "
        "request, the prompt's first positions as the window, and keys that changed places before scoring. Shuffled "
        "keys must "
        "bring the kept mass to chance; where another request's queries do not, importance is a matter of the keys.",
        tables=[Table(wide.reset_index(), "Late steps")],
    )


def _coverage(result: DriftResult) -> Section:
    c = result.found.coverage.iloc[0]
    text = (
        f"{int(c['whole_windows'])} of {int(c['requests'])} requests computed all queries of their window themselves; "
        f"{format_number(c['window_coverage'], 'percent')} of the window positions were computed, the others came "
        f"from the "
        "prefix cache, where queries do not exist. They were gathered through lineage from the requests that computed "
        "them."
    )
    if c["cut_windows"]:
        text += (
            f" In the {int(c['cut_windows'])} requests with a cut window the mean centred cosine is "
            f"{format_number(c['cosine_with_lineage'])} with lineage"
        )
        own = c["cosine_of_own_queries"]
        text += (
            "."
            if own is None or math.isnan(own)
            else f", and {format_number(own)} from the queries alone that they computed themselves."
        )
    return Section(heading="Which of these queries exist", text=text)


def _proof(result: DriftResult) -> Section:
    rows = [
        {"check": c.name, "covered": f"{c.covered:,} {c.unit}", "result": c.violation or "holds"} for c in result.checks
    ]
    return Section(
        heading="Why to believe it",
        text="The invariants of the ledger, checked on the files of the run.",
        tables=[Table(pd.DataFrame(rows), "Checks")],
    )


def _reach(excess: pd.DataFrame) -> str:
    """In which distances the tile's excess is, and what it is at the farthest."""
    if len(excess) < 2:
        return "0 means that decoding is only far away"
    farthest = excess.iloc[-1]
    return (
        f"fewer than {int(excess['distance'].iloc[1])} positions apart; from {int(farthest['distance'])} on "
        f"{_interval(farthest, 'excess')}. 0 means that decoding is only far away"
    )


def _interval(row: pd.Series, column: str) -> str:
    low, high = (format_number(row[f"{column}_{side}"], "decimal") for side in ("low", "high"))
    return f"{format_number(row[column], 'decimal')} ({low} to {high})"


def _median(x: float) -> str:
    return "beyond the data" if math.isinf(x) else format_number(x)
