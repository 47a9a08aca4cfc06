"""A graph in rows and columns: marks for nodes, curves for edges, from a bottom row of tokens up to an answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd

from sglang_probe.report._figure import Figure, listing, make_figure
from sglang_probe.report._svg import Canvas, num, text_width, wrap
from sglang_probe.report._tokens import visible
from sglang_probe.report.numbers import Kind, format_number

_COLUMN, _NARROWEST = 52.0, 38.0
"""Least width of a column in px, in wide and in narrow drawings."""
_STEP, _PAD = 15.0, 30.0
"""Between the marks of a cell, and above and below those of a row."""
_POSITIVE, _NEGATIVE = "s1", "s3"
_NAMED = 8
"""Nodes that have their name beside them, at most as many that raise the metric and half as many that lower it."""


def layered_graph(
    nodes: pd.DataFrame,
    edges: pd.DataFrame,
    rows: Sequence[str],
    heads: Mapping[int, str],
    *,
    title: str,
    caption: str = "",
    kinds: Sequence[str] = (),
) -> Figure:
    """Draw a graph; blue raises, orange lowers, and the width of an edge is its share of the strongest.

    Args:
        nodes: a row each: `node` (its name), `row`, `column` (a number), `kind`, `value` (signed), `short` (what stands
            beside the strongest where there is room), `tip`.
        edges: a row each: `source` and `target` (names of nodes), `value` (signed). Those without both ends are left
            out.
        rows: names of rows from the bottom up.
        heads: what stands below each column.
        kinds: in the order in which they take marks.

    Columns for which there is no room are left out, those of the smallest nodes first; the table has all.

    Raises:
        ValueError: a node twice, or in a row that is not named.
    """
    if nodes["node"].duplicated().any():
        raise ValueError("a node is there twice")
    if unknown := set(nodes["row"]) - set(rows):
        raise ValueError(f"no row {sorted(unknown)[0]!r}; there are {', '.join(rows)}")
    numbers = nodes.drop(columns=["tip", "short"])
    formats: dict[str, Kind] = {"value": "signed"}
    if nodes.empty:
        return make_figure(title, caption, numbers, formats, None, "")
    kinds = list(kinds) or list(dict.fromkeys(nodes["kind"]))
    weight = nodes.assign(size=nodes["value"].abs()).groupby("column")["size"].sum().sort_values(ascending=False)

    def draw(c: Canvas) -> None:
        legend = [("raises the metric", f"{_POSITIVE} fill"), ("lowers it", f"{_NEGATIVE} fill")]
        y = c.legend(legend)
        for i, kind in enumerate(kinds):
            c.mark(6 + i * 90, y, i, "s2 dot")
            c.text(16 + i * 90, y + 4, kind, "muted", size=11)
        y += 16
        gutter = min(max(map(text_width, rows)) + 12, 0.22 * c.width)
        room = max(int((c.width - gutter) // (_COLUMN if c.width > 500 else _NARROWEST)), 1)
        columns = sorted(weight.index[:room])
        shown = nodes[nodes["column"].isin(columns)]
        width = (c.width - gutter) / len(columns)
        x_of = {col: gutter + (i + 0.5) * width for i, col in enumerate(columns)}
        place: dict[str, tuple[float, float]] = {}
        lines = {}
        for row in reversed(rows):
            mine = shown[shown["row"] == row].sort_values("value", key=abs, ascending=False)
            tall = int(mine.groupby("column").size().max()) if len(mine) else 1
            height = 2 * _PAD + _STEP * (min(tall, 6) - 1)
            # More than six in a cell go on beside the first six.
            for col, cell in mine.groupby("column"):
                side = math.ceil(len(cell) / 6)
                for i, node in enumerate(cell["node"]):
                    x = x_of[col] + (i // 6 - (side - 1) / 2) * 13
                    here = min(len(cell) - 6 * (i // 6), 6)
                    place[node] = (x, y + height / 2 + (i % 6 - (here - 1) / 2) * _STEP)
            names = wrap(row, gutter - 8)
            c.paragraph(0, y + height / 2 - 7.5 * (len(names) - 1) + 4, names)
            lines[row] = y + height
            y += height
            if row != rows[0]:
                c.line(gutter, y, c.width, y, "grid")
        _edges(c, edges, place)
        largest = float(nodes["value"].abs().max()) or 1.0
        strong = set(shown.nlargest(_NAMED, "value", keep="all").index) | set(
            shown.nsmallest(_NAMED // 2, "value").index
        )
        for r in shown.itertuples():
            x, at = place[r.node]
            if r.short and r.Index in strong and c.width > 500 and text_width(r.short, 10) + 12 < width / 2:
                c.text(x + 11, at + 4, r.short, "muted", size=10)
            css = f"{_POSITIVE if r.value >= 0 else _NEGATIVE} dot"
            if abs(r.value) > 0.5 * largest:
                c.circle(x, at, 8, css.replace("dot", "ring"))
            c.mark(x, at, kinds.index(r.kind), css, r.tip)
        for col, x in x_of.items():
            c.text(x, y + 12, _fitted(visible(heads.get(col, "")), width - 4), "", "middle", 11)
            c.text(x, y + 26, str(col), "muted", "middle", 10)
        y += 34
        if left := len(weight) - len(columns):
            c.text(gutter, y + 8, f"{left} more positions have no room here", "muted", size=11)
            y += 16
        c.height = y

    said = listing(numbers.sort_values("value", key=abs, ascending=False), formats)
    return make_figure(title, caption, numbers, formats, draw, said)


def _edges(c: Canvas, edges: pd.DataFrame, place: Mapping[str, tuple[float, float]]) -> None:
    inside = edges[edges["source"].isin(place.keys()) & edges["target"].isin(place.keys())]
    if inside.empty:
        return
    largest = float(inside["value"].abs().max()) or 1.0
    for r in inside.sort_values("value", key=abs).itertuples():
        (x1, y1), (x2, y2) = place[r.source], place[r.target]
        grade = 1 + int(min(2, 3 * abs(r.value) / largest))
        middle = (y1 + y2) / 2
        path = f"M{num(x1)} {num(y1)}C{num(x1)} {num(middle)} {num(x2)} {num(middle)} {num(x2)} {num(y2)}"
        colour = _POSITIVE if r.value >= 0 else _NEGATIVE
        tip = f"{r.source} to {r.target}: {format_number(r.value, 'signed')}"
        c.path(path, f"{colour} edge w{grade}", tip)


def _fitted(text: str, width: float) -> str:
    """Cut to a width."""
    while len(text) > 2 and text_width(text, 11) > width:
        text = text[:-2] + "…"
    return text
