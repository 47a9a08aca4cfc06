"""The report of a comparison of two groups of texts."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sglang_probe.report.figures import dots
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.sae.differential import FalseDiscoveries
from sglang_probe.studies.diff.study import DiffResult

_HOW = (
    "Each text (or family of texts) has one rate per latent. On half of them latents are discovered: a permutation of "
    "the groups over texts, Benjamini-Hochberg over latents. The other half confirms: the same sign, and the same "
    "control of the false discovery rate. Beyond its tokens: the difference is still there when from each firing the "
    "share is taken with which the latent fires on that token anywhere. Else the groups may differ in words alone."
)


def answer(result: DiffResult) -> str:
    """What was found, in a sentence."""
    f = result.found
    beyond = int(result.latents["beyond_tokens"].sum())
    null = format_number(float(np.mean(f.null_confirmed)) if f.null_confirmed else 0.0, "average")
    return (
        f"{f.confirmed:,} of {f.tested:,} latents fire at another rate in `{result.b}` than in `{result.a}`, found on "
        f"half of the texts and confirmed on the other; {beyond:,} of them beyond what the tokens explain. With the "
        f"groups exchanged at random {null} are confirmed on average{_in_halves(result)}."
    )


def _in_halves(result: DiffResult) -> str:
    splits = [n for h in result.halves for n in h.confirmed]
    if not splits:
        return ""
    return f", and in {sum(n > 0 for n in splits)} of {len(splits)} splits of one group into random halves any is"


def shortlist_table(result: DiffResult) -> Table:
    """What is worth an intervention."""
    frame = result.shortlist.head(40)
    points = {name: 100 * frame[name] for name in ("difference", "matched")}
    said = np.where(frame["beyond_tokens"], "yes", "no")
    frame = frame.assign(label=frame["label"].str.replace("`", ""), tokens=said, **points)
    columns = [
        Column("latent", kind="text"),
        Column("label", "heuristic label"),
        Column("difference", "rate, B minus A, points", "points"),
        *([] if result.paired else [Column("rate_a", "A (B)", "percent", beside="rate_b")]),
        Column("standardised", "in standard deviations", "signed"),
        Column("matched", "beyond tokens, points", "points"),
        Column("tokens", "confirmed beyond tokens"),
        Column("q_confirm", "q, confirmation", "decimal"),
    ]
    return Table(frame, "shortlist", columns=columns, file="shortlist")


def _halves(result: DiffResult, h: FalseDiscoveries) -> tuple[str, str]:
    found = sum(n > 0 for n in h.confirmed)
    said = f"{found} of {len(h.confirmed)} splits of {h.units} units with a confirmed latent"
    return f"random halves of {(result.a, result.b)[h.group]}", said


def diff_page(result: DiffResult) -> Page:
    """The shortlist, and what it rests on."""
    f = result.found
    top = result.shortlist.head(15)
    shown = top.assign(name=top["latent"].astype(str))
    both = [shown.assign(value=100 * shown[c], of=w) for c, w in (("difference", "rate"), ("matched", "beyond tokens"))]
    figure = dots(
        pd.concat(both),
        "name",
        "of",
        "value",
        kind="points",
        title=f"Rate in {result.b} minus rate in {result.a}",
        caption="Confirmed latents; the second mark is what is left when tokens are matched.",
        x_label="percentage points",
    )
    null = (
        f"{format_number(float(np.mean(f.null_discovered)), 'average')} discovered, "
        f"{format_number(float(np.mean(f.null_confirmed)), 'average')} confirmed"
        if f.null_discovered
        else "not measured"
    )
    return Page(
        title=f"Features that differ: {result.a} and {result.b}",
        answer=answer(result),
        picture=figure if len(top) else None,
        tiles=[
            Tile("discovered", f"{f.discovered:,}", f"of {f.tested:,} tested, at a rate of {result.q:g}"),
            Tile("confirmed", f"{f.confirmed:,}", "on the other half of the texts"),
            Tile("beyond tokens", f"{int(result.latents['beyond_tokens'].sum()):,}", "within matched token ids"),
        ],
        facts=[
            ("SAE", f"{result.sae} ({result.weights[:16]})"),
            ("hook point", result.hook_point),
            ("runs", ", ".join(result.runs)),
            ("groups", f"A: {result.by} `{result.a}`; B: {result.by} `{result.b}`"),
            ("unit", result.unit + (", each with both groups" if result.paired else "")),
            ("units", f"{result.units[0]:,} and {result.units[1]:,}"),
            ("rows", f"{result.rows[0]:,} and {result.rows[1]:,}"),
            ("groups exchanged at random", null),
            *(_halves(result, h) for h in result.halves),
        ],
        sections=[
            Section(
                "Shortlist",
                "A difference of rates is not a cause. Make a vector of a latent with `sglang-probe vector make "
                "sae-feature`, steer or ablate it, and see whether what differs between the groups moves.",
                tables=[shortlist_table(result)],
                notes=list(result.notes),
                nothing="no latent was confirmed",
            ),
            Section("How it was tested", _HOW),
        ],
    )
