"""The report of a tuned lens."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import lines
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.lens.page import layer_name
from sglang_probe.studies.lens.tune import CHOOSE, FIT, HELD_OUT, TuneResult


def answer(result: TuneResult) -> str:
    """What was found, in a sentence."""
    plain, tuned = result.layers["plain"].mean(), result.layers["tuned"].mean()
    return (
        f"On held-out texts the tuned lens is {format_number(tuned, 'decimal')} nats from the model's own prediction, "
        f"on average over {len(result.layers)} layers, the plain one {format_number(plain, 'decimal')}."
    )


def layer_table(result: TuneResult) -> Table:
    """A row for each layer."""
    columns = [
        Column("name", "layer", "text"),
        Column("tuned", "KL(final ‖ layer), nats, tuned (plain)", "decimal", beside="plain"),
        Column("saved", "saved, by family of texts", "signed", bounds=("saved_low", "saved_high")),
        Column("tuned_agreement", "final token is the likeliest, tuned (plain)", "percent", beside="plain_agreement"),
        Column("how", "map"),
    ]
    frame = result.layers.assign(name=result.layers["layer"].map(layer_name))
    return Table(frame, "on held-out texts, by layer", columns=columns, file="layers")


def tune_page(result: TuneResult) -> Page:
    """KL by layer of both lenses."""
    both = [result.layers.assign(kl=result.layers[c], lens=c) for c in ("tuned", "plain")]
    used = [
        f"{name}: {result.rows[name]:,} rows of {result.families[name]:,} families" for name in (FIT, CHOOSE, HELD_OUT)
    ]
    return Page(
        title=f"Tuned lens: {result.run}",
        answer=answer(result),
        picture=lines(
            pd.concat(both),
            "layer",
            "kl",
            "lens",
            kind="decimal",
            title="KL(final ‖ layer) on held-out texts",
            caption="-1 is the embedding.",
            x_label="layer",
            y_label="nats",
        ),
        tiles=[
            Tile("saved", f"{format_number(result.layers['saved'].mean(), 'signed')} nats", "mean over layers"),
            Tile("held out", f"{result.rows[HELD_OUT]:,} rows", f"of {result.families[HELD_OUT]:,} families of texts"),
        ],
        facts=[("model", result.model), ("rows", "; ".join(used))],
        sections=[
            Section(
                "By layer",
                "Of all maps and the plain lens the one with the least KL on the texts to choose by is taken. Those "
                "that are held out choose nothing: there it may be worse than the plain lens.",
                tables=[layer_table(result)],
                notes=list(result.notes),
            )
        ],
        footer="Belrose et al. 2303.08112. Least squares to the last layer's rows, then descent on the KL.",
    )
