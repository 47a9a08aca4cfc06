"""Sections of the drift report on what is read: importance, how long the window predicts it, and where it changes."""

from __future__ import annotations

import math

import pandas as pd

from sglang_probe.report.figures import Figure, lines
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Section
from sglang_probe.report.tables import Column, Table
from sglang_probe.stats.intervals import TOO_FEW
from sglang_probe.studies.pages import only
from sglang_probe.studies.query_drift.study import DriftResult
from sglang_probe.studies.query_drift.summary import ALL

SNAPKV_PUBLISHED = {128: 0.9463, 64: 0.9429, 32: 0.9508, 16: 0.9466, 8: 0.9416, 4: 0.9385, 2: 0.9332, 1: 0.8426}
DAPQ_PUBLISHED = {128: 0.9785, 64: 0.9747, 32: 0.9726, 16: 0.9713, 8: 0.9705, 4: 0.9644, 2: 0.9615, 1: 0.8768}
"""Cosine of window-averaged attention to that of the response, DapQ (arXiv 2603.11564v1), table 8."""


def importance(result: DriftResult) -> Section:
    """Does the drift reach the attention weights?"""
    f = result.found
    windows = f.windows
    if len(windows):
        windows = windows.pivot(index="window", columns="measure", values="value").reset_index()
        windows = windows.assign(
            **{
                "SnapKV, published": windows["window"].map(SNAPKV_PUBLISHED),
                "DapQ, published": windows["window"].map(DAPQ_PUBLISHED),
            }
        ).rename(columns={"cosine": "window here", "without_sinks": "window here, sinks left out"})
        windows = windows.sort_values("window", ascending=False)
    distances = {"js": "Jensen-Shannon divergence", "functional": "change of the logits"}
    figures = [
        lines(
            only(f.steps, layer=ALL, metric=name),
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
                "common to all keys is removed.",
            ),
        )
    ]
    return Section(
        heading="Does it change what is read?",
        figures=figures,
        tables=[
            Table(
                windows,
                "Cosine of window-averaged attention to that of the whole response, in the layout of DapQ's table 8",
                columns=[Column(str(c), kind="integer" if c == "window" else "decimal") for c in windows.columns],
            )
        ],
        notes=[
            "Published numbers: arXiv 2603.11564v1, table 8, other models and other prompts. In a model with "
            "attention sinks, sinks decide a cosine of attention rows."
        ],
    )


def kept_mass(result: DriftResult) -> Figure:
    """The share of the attention mass that the window's choice holds, by step, beside chance and recency."""
    names = {"window": "chosen by the window", "recency": "most recent", "random": "random"}
    recall = only(result.found.recall, layer=ALL)
    return lines(
        recall.assign(policy=recall["policy"].map(lambda p: names.get(p, p))) if len(recall) else recall,
        "step",
        "value",
        "policy",
        low="value_low",
        high="value_high",
        kind="percent",
        log_x=True,
        title="Non-trivial attention mass on the positions that are kept",
        x_label="decode step (first of its bin)",
        y_label="share",
        caption="Only requests that reach the last step shown, so that every step is a mean over the same requests. "
        "Bands are 95 % intervals over prompts.",
    )


def horizon(result: DriftResult) -> Section:
    """For how many steps the window's choice is worth more than a baseline."""
    f = result.found
    part = only(f.survival, layer=ALL)
    part = part.assign(baseline="against " + part["baseline"])[part["step"].notna()] if len(part) else part
    o = result.options
    return Section(
        heading="How long does the window predict?",
        text=f"The window keeps {o.budget:.0%} of the prompt (unpooled attention of its queries, sinks and window "
        "included). Recall is the share of the attention mass on candidates (neither sinks nor window) that falls on "
        f"kept ones. The horizon ends at the first {o.run} steps in a row in which recall is no better than the "
        "baseline's; a response that ends first is censored, not a failure (Kaplan and Meier). Half-lives are of the "
        "mean recall of requests that last as long as the longest; none is given where the curve does not come down "
        "to a limit.",
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
        ],
        tables=[horizon_table(result), horizon_table(result, None)],
        notes=[
            "The interval is over prompt families: the steps at which the interval of the survival holds one half "
            "(Brookmeyer and Crowley 1982). A window without any information would last for some steps, too. So the "
            "last columns have a null: the steps until the window fails among the first ones that all responses have, "
            "on average, after the prompt and after borders inside the prompt (placebo), and p as for excess drift. "
            "Fewer steps than at a placebo border mean that decoding leaves the window sooner than text does."
        ],
    )


def horizon_table(result: DriftResult, layer: str | None = ALL) -> Table:
    """Median horizon in steps, and the recall of the window beside that of the baseline; of one layer, or of each."""
    found = result.found.horizon
    found = only(found, layer=layer) if layer else found
    title = "For how many steps the window predicts" + ("" if layer else ", by layer")
    if found.empty:
        return Table(found, title)
    frame = found.assign(median=[_median(x) for x in found["median"]])
    if {"median_low", "median_high"} <= set(found.columns):
        ends = zip(found["median_low"], found["median_high"], strict=True)
        frame = frame.assign(interval=[_ends(a, b) for a, b in ends])
    columns = [
        Column("layer", kind="text"),
        Column("baseline"),
        Column("median", "median horizon, steps"),
        *([Column("interval", "95 % interval")] if "interval" in frame else []),
        Column("recall", "recall (baseline's)", "percent", beside="baseline_recall"),
        Column("failed", "requests that failed"),
        Column("failed_at_once", "at once"),
        Column("requests"),
        Column("half_life", "half-life, steps"),
        Column("upto_mean", f"of the first {_upto(found)} (placebo)", "average", beside="placebo_mean"),
        Column("beyond", "beyond placebo, 95 %", "signed", bounds=("beyond_low", "beyond_high")),
        Column("p", kind="decimal"),
    ]
    return Table(frame, title, columns=columns, long=layer is None, file="" if layer else "means_horizon")


def changes(result: DriftResult) -> Section:
    """Change points of the attention over the prompt."""
    shares = {"found": "found", "text": "in text", "agreement": "agreement"}
    columns = [
        Column("layer", kind="text"),
        *(Column(c, f"{h}, 95 %", "percent", bounds=(f"{c}_low", f"{c}_high")) for c, h in shares.items()),
        Column("beyond", "found beyond text, 95 %", "signed", bounds=("beyond_low", "beyond_high")),
        Column("level", kind="percent"),
        Column("block", "steps a block", "average"),
        Column("prompts"),
    ]
    return Section(
        heading="Change points",
        text="A CUSUM over the steps of each response finds the split at which attention over the prompt changes "
        "most. Its null is the same steps in random order of blocks, each twice as long as the autocorrelation time of "
        "that head's attention (at most a quarter of the steps): neighbouring steps resemble each other in any text. "
        "**Found** is the share of heads that exceed it (the **level** is expected without a change; simulations with "
        "strongly alike neighbours gave up to twice that), **in text** the same for as many positions after a border "
        "inside the prompt: what human text does, read by the same heads. **Beyond** is the difference. "
        "**Agreement** is the largest share of heads that change within one step of each other. Slow drift exceeds the "
        "null as a jump does.",
        tables=[Table(result.found.changes, "Change points", columns=columns, long=len(result.found.changes) > 12)],
        nothing="no response has steps enough",
    )


def _upto(found: pd.DataFrame) -> str:
    known = found["upto"].dropna() if "upto" in found else found.iloc[:0]
    return f"{int(known.iloc[0])} steps" if len(known) else "steps"


def _ends(low: float, high: float) -> str:
    return TOO_FEW if math.isnan(low) else f"[{_median(low)}, {_median(high)}]"


def _median(x: float) -> str:
    return "not reached" if math.isinf(x) else format_number(x)
