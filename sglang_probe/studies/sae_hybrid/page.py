"""The report of a study of mixtures."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import Figure, lines
from sglang_probe.report.numbers import MISSING, format_interval, format_number
from sglang_probe.report.page import Page, Section
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.pages import only, proof
from sglang_probe.studies.phase.study import DECODED, HUMAN
from sglang_probe.studies.sae_hybrid.study import HybridResult

_SOURCE, _SHARE = Column("source"), Column("share", "share that is the model's own", "percent")


def answer(result: HybridResult) -> str:
    """What was found, in a sentence."""
    most = only(result.fvu, source=DECODED)
    most = most[most["share"] == most["share"].max()] if len(most) else most
    if most.empty:
        return "Nothing was compared."
    parts = []
    for arm in (DECODED, HUMAN):
        row = only(most, arm=arm).iloc[0]
        ends = format_interval(row.get("more_low"), row.get("more_high"), "points")
        known = f" {ends}" if ends != MISSING else ""
        parts.append(f"{format_number(row['more'], 'points')}{known} of {arm} rows")
    return (
        f"With {format_number(float(most['share'].iloc[0]), 'percent')} decoded rows in place of human ones a "
        f"dictionary leaves unexplained, in percentage points more: {' and '.join(parts)}."
    )


def fvu_table(result: HybridResult) -> Table:
    """Reconstruction by mixture."""
    more = Column("more", "more than with human text alone, 95 %", "points", bounds=("more_low", "more_high"))
    columns = [_SOURCE, _SHARE, Column("arm", "rows held out"), Column("fvu", "unexplained", "percent"), more]
    return Table(result.fvu, "unexplained share of rows held out", columns=columns, file="fvu")


def gap_table(result: HybridResult) -> Table:
    """The gap between decoded and human rows, by mixture."""
    gap = Column("gap", "decoded minus human, 95 %", "points", bounds=("gap_low", "gap_high"))
    return Table(result.gaps, "gap in reconstruction", columns=[_SOURCE, _SHARE, gap], file="gaps")


def match_table(result: HybridResult) -> Table:
    """Distances, by mixture."""
    columns = [
        _SOURCE,
        _SHARE,
        Column("moved", "from human text, same seed (at chance)", "decimal", beside="moved_chance"),
        Column("seeds", "between seeds (at chance)", "decimal", beside="seeds_chance"),
    ]
    return Table(result.matches, "distance of dictionaries", columns=columns, file="matches")


def hybrid_page(result: HybridResult) -> Page:
    """Reconstruction, gap, identity."""
    of, config = result.of, result.of["config"]
    repeated = ", ".join(f"{arm} {format_number(v, 'percent')}" for arm, v in of["repeated_8_grams"].items())
    return Page(
        title=f"Mixtures of human and decoded rows: {result.name}",
        answer=answer(result),
        picture=_picture(result),
        lead=f"{of['keys']:,} positions to train on, the same in the same order for all; {of['rows_held_out']:,} of "
        f"{of['families_held_out']} other families to judge by. At each position the row is of human text, or of the "
        "model's own: decoded, or prefilled again (the control: the same text without the phase).",
        facts=[
            ("model", str(of["model"]["name"])),
            ("hook point", config["hook_point"]),
            ("rows whose last 8 tokens were seen before", repeated),
            *((k, str(config[k])) for k in ("architecture", "latents", "k", "samples", "batch_size", "seeds")),
            ("sampling", str(config["sampling"])),
        ],
        sections=[
            Section(
                "Reconstruction",
                "Share of one variance, that of human rows. Means over seeds; intervals over families of texts.",
                tables=[fvu_table(result), gap_table(result)],
            ),
            Section(
                "Are they the same features?",
                "One minus the mean cosine of the best matching of alive latents. A mixture has moved a dictionary no "
                "further than anything does as long as the first number is below the second.",
                tables=[match_table(result)],
                notes=["The effect of matched latents as steering vectors was not measured here."],
            ),
            proof(result.checks),
        ],
    )


def _picture(result: HybridResult) -> Figure:
    frame = result.fvu
    if len(frame):
        human = frame[frame["source"] == HUMAN]
        sources = [s for s in dict.fromkeys(frame["source"]) if s != HUMAN]
        whole = pd.concat([human.assign(source=s) for s in sources] + [frame[frame["source"] != HUMAN]])
        frame = whole.assign(curve=whole["arm"] + " rows, mixed with " + whole["source"])
        frame = frame[frame["arm"].isin([HUMAN, DECODED]) & frame["share"].notna()].sort_values("share", kind="stable")
    return lines(
        frame,
        "share",
        "fvu",
        "curve",
        kind="percent",
        title="Unexplained share by the share of the model's own rows in training",
        x_label="share of the model's own rows",
        y_label="unexplained",
    )
