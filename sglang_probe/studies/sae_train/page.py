"""The report of a training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from sglang_probe.report.figures import Figure, dots, lines
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.studies.sae_train.study import TrainResult

RECALIBRATED = "threshold recalibrated"
AS_TRAINED = "as trained"


def train_page(result: TrainResult) -> Page:
    """How good the dictionaries are, where they are not, and how they got there."""
    best = result.dictionaries.sort_values("explained_variance").iloc[-1]
    of, rows = result.identity, result.identity["rows"]
    left_out = int(result.left_out["rows"].sum())
    explained, dead = (format_number(best[n], "percent") for n in ("explained_variance", "dead_share"))
    l0 = format_number(best["l0"], "average")
    return Page(
        title=f"Sparse autoencoders: {result.name}",
        answer=f"`{best['dictionary']}` explains {explained} of the variance of rows that were held out, with {l0} of "
        f"{best['latents']:,} latents active in a row; {dead} of the latents never fire there.",
        picture=_curve(result),
        lead=f"Rows of `{of['hook_point']}` of {of['model'] or 'an unnamed model'}: {rows['train']:,} to train on and "
        f"{int(best['rows']):,} of other families of requests to judge by. {left_out:,} rows were left out of the "
        "first as attention sinks or repeats.",
        tiles=[
            Tile("explained variance", explained, "of rows held out"),
            Tile("active latents", l0, "of a row, on average"),
            Tile("dead latents", dead, f"in {int(best['rows']):,} rows"),
        ],
        facts=[
            ("hook point", of["hook_point"]),
            ("model", str(of["model"])),
            *_shuffled(rows),
            *((str(k), str(v)) for k, v in of["config"].items() if k not in ("hook_point",) and v is not None),
            *((name, str(v)) for name, v in of["versions"].items()),
        ],
        sections=[_dictionaries(result), _groups(result), _left_out(result)],
        footer="Every dictionary's `cfg.json` says which runs, by the hashes of their manifests, it was trained on.",
    )


def _shuffled(rows: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How rows were shuffled, and what an interruption cost, where there is something to say."""
    if "shuffled_together" in rows:
        yield "rows shuffled together", f"{rows['shuffled_together']:,}"
    for at in rows.get("resumed", []):
        told = f"{at['rows_recorded_again']:,} rows recorded again, {at['rows_lost']:,} not there any more"
        yield f"went on at step {at['step']:,}", told


def dictionary_table(result: TrainResult) -> Table:
    """A row for each dictionary."""
    columns = [
        Column("dictionary"),
        Column("explained_variance", "explained variance (as trained)", "percent", "explained_variance_as_trained"),
        Column("l0", "L0 (as trained)", "average", "l0_as_trained"),
        Column("dead_share", "dead", "percent"),
        Column("relative_error", "error / norm² (median)", "percent"),
        Column("threshold", kind="decimal"),
        Column("seconds", kind="seconds"),
    ]
    frame = result.dictionaries
    return Table(frame, "dictionaries", columns=[c for c in columns if c.name in frame], file="dictionaries")


def left_out_table(result: TrainResult) -> Table:
    """Rows that were left out."""
    return Table(result.left_out, "rows left out", file="left_out")


def _curve(result: TrainResult) -> Figure:
    """Explained variance of held-out rows by rows trained on."""
    parts = []
    for name, label in (("recalibrated", RECALIBRATED), ("held_out", AS_TRAINED)):
        if name in result.curve:
            part = result.curve[["dictionary", "samples", name]].rename(columns={name: "value"})
            parts.append(part.assign(curve=part["dictionary"] + f", {label}" * ("recalibrated" in result.curve)))
    shown = pd.concat(parts, ignore_index=True)
    return lines(
        # Far below zero there is nothing to read but that it is far below: an SAE with a wrong threshold.
        shown.assign(value=shown["value"].clip(lower=0)),
        "samples",
        "value",
        "curve",
        kind="percent",
        title="Explained variance of held-out rows by rows trained on",
        caption="Negative values (a threshold that training has not found yet) are drawn as zero; the table has them.",
        x_label="rows trained on",
        y_label="explained variance",
    )


def _dictionaries(result: TrainResult) -> Section:
    return Section(
        "How good each dictionary is",
        "Explained variance is one minus the mean squared error over the variance of the same rows; sinks are in "
        "neither. L0 is the number of active latents of a row. A latent is dead if it fires in none of the rows held "
        "out. In brackets: with the threshold that training left.",
        tables=[dictionary_table(result)],
    )


def _groups(result: TrainResult) -> Section:
    columns = [
        Column("dictionary"),
        Column("axis"),
        Column("group"),
        Column("fvu", "unexplained (of its own variance)", "percent", beside="fvu_own"),
        Column("l0", "L0", "average"),
        Column("relative_error", "error / norm² (median)", "percent"),
        Column("rows"),
    ]
    first = result.groups[result.groups["dictionary"] == result.dictionaries["dictionary"].iloc[0]]
    shown = first.assign(row=first["axis"] + ": " + first["group"])
    figure = dots(
        shown,
        "row",
        "dictionary",
        "fvu",
        kind="percent",
        title=f"Unexplained share by kind of row, of {result.dictionaries['dictionary'].iloc[0]}",
        caption="Of one variance, that of all rows held out, so that groups can be compared.",
        x_label="unexplained",
    )
    return Section(
        "Where it is worse", figures=[figure], tables=[Table(result.groups, "", columns=columns, file="groups")]
    )


def _left_out(result: TrainResult) -> Section:
    return Section(
        "What was left out",
        "The first position of a request, and rows whose norm is far above the median, are attention sinks: after "
        "most layers of most models they carry nearly all of the variance, and a dictionary of nothing else would "
        "look perfect.",
        tables=[left_out_table(result)],
        nothing="no row was left out",
    )
