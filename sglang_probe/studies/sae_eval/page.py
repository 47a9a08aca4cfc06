"""The report of an evaluation."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import dots
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.sae_eval.study import EvalResult


def answer(result: EvalResult) -> str:
    """What was found, in a sentence."""
    f = result.found
    return (
        f"`{result.sae}` explains {format_number(f.explained_variance, 'percent')} of the variance of "
        f"{len(f.rows):,} rows of `{result.hook_point}`, with {format_number(f.l0, 'average')} of {len(f.fired):,} "
        f"latents active in a row; {format_number(f.dead_share, 'percent')} of the latents fire in none."
    )


def group_table(result: EvalResult) -> Table:
    """By kind of row."""
    columns = [
        Column("axis"),
        Column("group"),
        Column("fvu", "unexplained (of its own variance)", "percent", beside="fvu_own"),
        Column("l0", "L0", "average"),
        Column("relative_error", "error / norm² (median)", "percent"),
        Column("rows"),
    ]
    return Table(result.groups, "by kind of row", columns=columns, file="groups")


def against_table(against: pd.DataFrame) -> Table:
    """Ours beside SAELens'."""
    frame = against.assign(difference=[f"{d:+.1e}" for d in against["difference"]])
    for name in ("ours", "theirs"):
        frame[name] = [f"{v:.6g}" for v in against[name]]
    columns = [Column(n) for n in ("quantity", "ours", "theirs", "difference", "measured_on", "why")]
    return Table(frame, "ours and SAELens' own evaluation of the same weights", columns=columns, file="against")


def eval_page(result: EvalResult) -> Page:
    """How good the SAE is on these rows, and on which it is not."""
    f = result.found
    shown = result.groups.assign(row=result.groups["axis"] + ": " + result.groups["group"], sae=result.sae)
    figure = dots(
        shown,
        "row",
        "sae",
        "fvu",
        kind="percent",
        title="Unexplained share by kind of row",
        caption="Of one variance, that of all rows, so that groups can be compared.",
        x_label="unexplained",
    )
    facts = [("hook point", result.hook_point), ("weights", result.weights[:16])]
    facts.append(("variance of these rows", format_number(f.variance)))
    if result.training_variance:
        facts.append(("variance of the rows of its training", format_number(result.training_variance)))
    return Page(
        title=f"A sparse autoencoder on recorded rows: {result.sae}",
        answer=answer(result),
        picture=figure,
        tiles=[
            Tile("explained variance", format_number(f.explained_variance, "percent"), "sinks left out"),
            Tile("active latents", format_number(f.l0, "average"), "of a row, on average"),
            Tile("dead latents", format_number(f.dead_share, "percent"), f"in {len(f.rows):,} rows"),
        ],
        facts=facts,
        sections=[
            Section("By kind of row", tables=[group_table(result)], notes=list(result.notes)),
            *([] if result.against is None else [Section("What SAELens says", tables=[against_table(result.against)])]),
            Section(
                "What was left out",
                "Attention sinks: first positions, and rows whose norm is far above the median.",
                tables=[Table(result.left_out, "rows left out", file="left_out")],
                nothing="no row was left out",
            ),
        ],
    )
