"""The report of a row-count study."""

from __future__ import annotations

import pandas as pd

from sglang_probe.report.figures import Figure, lines
from sglang_probe.report.numbers import format_number
from sglang_probe.report.page import Page, Section, Tile
from sglang_probe.report.tables import Column, Table
from sglang_probe.run import schema
from sglang_probe.studies.pages import HOOK_POINT, deepest, facts, footer, only, proof
from sglang_probe.studies.row_counts.study import RowCountsResult, in_words

PHASES = {
    schema.PREFILL: "prefill after the cached prefix",
    schema.DECODE: "decode",
    "prefix": "the cached prefix itself",
    "repeat": "the whole text again (floor)",
}


_NOTHING = "no hook point was compared"


def row_counts_page(result: RowCountsResult) -> Page:
    """The page of one study: which row counts change bits, and by how much."""
    machine = result.machine
    return Page(
        title=f"Rows of a forward: {result.name}",
        answer=answer(result),
        picture=_curves(result, "l2", "relative L2 to the text computed whole", log=True),
        tiles=[
            Tile("floor", _floor(result), "share of rows that are bit-identical when the same text is computed again"),
            Tile("largest difference", _largest(result), "relative L2 of one row, at any hook point and row count"),
        ],
        lead=f"{format_number(result.texts)} texts. Each was computed whole, in a forward of "
        f"{format_number(result.whole)} rows; then its first {format_number(result.prefix)} tokens were put into the "
        "prefix cache and the tokens after them were computed in forwards of other numbers of rows, alone; then they "
        "were decoded beside others. Same tokens, same positions: what differs is how many rows a forward had.",
        facts=facts(
            result.manifest,
            ("CPU", f"{machine['cpu']}, {machine['instructions']}" if machine else "not known"),
            ("threads of the bare kernels", machine.get("threads", "not known")),
        ),
        sections=[_classes(result), _sizes(result), _products(result), proof(result.checks)],
        footer=footer(result.manifest),
    )


def answer(result: RowCountsResult) -> str:
    """The finding in a sentence."""
    at = deepest(result.classes)
    if not len(at):
        return f"Nothing can be said: {_NOTHING}."
    where = at["hook_point"].iloc[0]
    told = [
        " and ".join(
            part
            for part in (
                f"{row.prefill} in prefill" if row.prefill else "",
                f"{row.decode} in decode" if row.decode else "",
                f"{result.whole} (the whole text)" if row.whole else "",
            )
            if part
        )
        for row in at.itertuples()
    ]
    if len(told) == 1:
        return f"In {result.manifest['rows_dtype']} every row count gives the same bits at `{where}`: {told[0]}."
    return (
        f"In {result.manifest['rows_dtype']} the row counts fall into {len(told)} classes at `{where}`, and rows of "
        f"two classes differ in bits: {'; '.join(told)}."
    )


def _floor(result: RowCountsResult) -> str:
    again = only(result.distances, phase="repeat")
    return format_number(again["identical"].min() if len(again) else None, "percent")


def _largest(result: RowCountsResult) -> str:
    return format_number(result.distances["l2_max"].max() if len(result.distances) else None, "scientific")


def classes_table(result: RowCountsResult) -> Table:
    """Row counts with equal bits."""
    columns = [
        HOOK_POINT,
        Column("class"),
        Column("prefill", "rows, prefill"),
        Column("decode", "rows, decode"),
        Column("whole", f"the whole text ({result.whole} rows)"),
    ]
    frame = result.classes
    if len(frame):
        frame = frame.assign(whole=frame["whole"].map({True: "yes", False: ""}))
    title = f"Row counts with the same bits, first position after {result.prefix} cached tokens"
    return Table(frame, title, columns=columns, long=len(frame) > 30, file="classes")


def distances_table(result: RowCountsResult) -> Table:
    """How far rows are from those of the whole text."""
    columns = [
        HOOK_POINT,
        Column("phase"),
        Column("rows", "rows of the forward"),
        Column("identical", "bit-identical", "percent"),
        Column("l2", "mean relative L2, 95 % interval", "scientific", bounds=("low", "high")),
        Column("l2_max", "largest", "scientific"),
        Column("positions"),
    ]
    frame = result.distances
    if len(frame):
        frame = frame.assign(phase=frame["phase"].map(PHASES))
    return Table(frame, "Against the text computed whole", columns=columns, long=True, file="distances")


def products_table(result: RowCountsResult) -> Table:
    """What the bare products do."""
    grouped = result.products.groupby(["product", "inputs", "outputs"], sort=False) if len(result.products) else ()
    rows = [
        {"product": product, "shape": f"{inputs} to {outputs}", "classes": "; ".join(_classes_of(found))}
        for (product, inputs, outputs), found in grouped
    ]
    columns = [Column("product"), Column("shape"), Column("classes", "row counts with the same bits")]
    return Table(pd.DataFrame(rows, columns=["product", "shape", "classes"]), "Bare kernels", columns=columns)


def _classes_of(found: pd.DataFrame) -> list[str]:
    return [in_words(cell["rows"].tolist()) for _, cell in found.groupby("class", sort=True)]


def _curves(result: RowCountsResult, column: str, label: str, *, log: bool = False) -> Figure:
    return lines(
        only(result.distances, phase=schema.PREFILL),
        "rows",
        column,
        "hook_point",
        title=f"Prefill after {result.prefix} cached tokens: {label}",
        x_label="rows of the forward",
        y_label=label,
        kind="scientific" if log else "percent",
        log_y=log,
    )


def _classes(result: RowCountsResult) -> Section:
    return Section(
        heading="Which row counts change bits?",
        text="Row counts are in one class if the row of the first position after the prefix has the same bits in every "
        "text. Rows of two classes differ in at least one text.",
        tables=[classes_table(result)],
        nothing=_NOTHING,
    )


def _sizes(result: RowCountsResult) -> Section:
    again = only(result.distances, phase="prefix")
    prefix = format_number(again["identical"].min() if len(again) else None, "percent")
    return Section(
        heading="How large are the differences?",
        text="All positions after the prefix, against the same positions of the text computed whole. "
        f"Of the cached prefix itself, which every counted forward reads, at least {prefix} of the rows at each hook "
        "point are bit-identical to those of the whole text; where that is 100 %, what differs after it comes from the "
        "counted forward alone.",
        figures=[_curves(result, "identical", "share of rows that are bit-identical")],
        tables=[distances_table(result)],
        nothing=_NOTHING,
    )


def _products(result: RowCountsResult) -> Section:
    return Section(
        heading="Is it the kernels?",
        text="The same question, asked of each product and of attention alone on the machine that recorded, with "
        "normal numbers for weights and rows. Classes that none of these has come from what the engine does around "
        "them.",
        tables=[products_table(result)],
        nothing="the bare kernels were not measured on the machine that recorded",
    )
