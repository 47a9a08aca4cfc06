"""Dots with intervals: rows named at the left, one mark a series, and panels side by side that share the rows.

Ranks many things at once. Marks differ in shape as well as in colour, and reference lines are named in the legend.
"""

from __future__ import annotations

import math

import pandas as pd

from sglang_probe.report._axes import Scale, draw_ticks_below, round_ticks, tick_labels
from sglang_probe.report._figure import Figure, listing, make_figure
from sglang_probe.report._frame import distinct, interval_columns, numbers, select
from sglang_probe.report._svg import WIDE, Canvas, mark_class, num, text_width, wrap
from sglang_probe.report.numbers import Kind, format_number

_PITCH, _LEAST_PANEL = 9.0, 118.0

Mark = tuple[float, float, float, str]


def dots(
    frame: pd.DataFrame,
    row: str,
    series: str,
    value: str,
    *,
    title: str,
    caption: str = "",
    panel: str | None = None,
    kind: Kind = "auto",
    low: str | None = None,
    high: str | None = None,
    references: pd.DataFrame | None = None,
    x_label: str = "",
    zero: bool = True,
) -> Figure:
    """A line of dots per row and panel. Rows, series and panels keep their order in the frame, or a categorical's.

    An interval is drawn where both its ends are known.

    Args:
        references: `name` and `value` of vertical lines, with the column `panel` if there are panels, and `series` for
            lines in the colour of a series; of one name a panel may have several.
        zero: whether the axis has zero.
    """
    bounds = interval_columns(low, high)
    keys = [*([panel] if panel else []), row, series]
    data = select(frame, [*keys, value], unique=keys, bounds=bounds)
    rows, names = distinct(data[row]), distinct(data[series])
    panels = distinct(data[panel]) if panel else [""]
    cells = _cells(data, panel, row, series, [value, *bounds])
    lines = _lines(references, panel)
    drawn = [x for cell in cells.values() for x in cell if not math.isnan(x)]
    everything = [*drawn, *(x for found in lines.values() for _, x, _ in found)]
    percent = kind == "percent" and bool(drawn) and min(everything) >= 0 and max(everything) <= 1
    ends = (0.0, 1.0) if percent else _ends([0.0, *everything] if zero else everything)
    named = list(dict.fromkeys(name for found in lines.values() for name, _, _ in found))

    def draw(c: Canvas) -> None:
        top = _legend(c, names, named)
        wide = c.width == WIDE
        gutter = min(max(map(text_width, rows)) + 12, (0.32 if wide else 0.4) * c.width)
        labels = [wrap(r, gutter - 10) for r in rows]
        pitch = max(_PITCH * len(names), 17.0)
        heights = [max(pitch + 6, 15.0 * len(label) + 4) for label in labels]
        across = max(1, min(len(panels), int((c.width - gutter) // _LEAST_PANEL)))
        width = (c.width - gutter) / across
        for start in range(0, len(panels), across):
            band = panels[start : start + across]
            heads = [wrap(p, width - 20, 11, True) for p in band]
            y = top + 15 * max(map(len, heads)) + (4 if panel else -12)
            bottom = y + sum(heights)
            at = y
            for i, label in enumerate(labels):
                c.paragraph(0, at + (heights[i] - 15 * len(label)) / 2 + 11, label)
                c.line(0, at, c.width, at, "grid")
                at += heights[i]
            for i, name in enumerate(band):
                left = gutter + i * width
                ticks = round_ticks(*ends, 3 if across > 1 or not wide else 6)
                ticks = [t for t in ticks if ends[0] - 1e-12 <= t <= ends[1] + 1e-12] if percent else ticks
                x = Scale(
                    min(ticks[0], ends[0]),
                    max(ticks[-1], ends[1]),
                    left + 8,
                    left + width - (26 if len(band) > 1 else 16),
                )
                c.paragraph(left + 8, top + 11, heads[i] if panel else [], "strong", size=11)
                for tick in ticks:
                    c.line(x(tick), y, x(tick), bottom, "grid")
                draw_ticks_below(c, x, ticks, tick_labels(ticks, kind), bottom)
                for line, v, owner in lines.get(name, []):
                    hue = mark_class(names.index(owner)) if owner in names else "ink"
                    tip = f"{name + ', ' if name else ''}{line}: {format_number(v, kind)}"
                    c.path(f"M{num(x(v))} {num(y)}V{num(bottom)}", f"{hue} rule{_dash(named.index(line))}", tip)
                at = y
                for r, height in zip(rows, heights, strict=True):
                    first = at + (height - pitch) / 2
                    for j, s in enumerate(names):
                        cell = cells.get((name, r, s))
                        if cell is not None and not math.isnan(cell[0]):
                            tip = ", ".join(k for k in (name, r, s) if k) + f": {format_number(cell[0], kind)}"
                            _mark(c, x, first + pitch * (j + 0.5) / len(names), cell, j, tip)
                    at += height
            c.line(0, bottom, c.width, bottom, "axis")
            top = bottom + 34
        if x_label:
            said = wrap(x_label, c.width - gutter, 11)
            c.paragraph((gutter + c.width) / 2, top + 2, said, "muted", "middle", 11)
            top += 3 + 15 * len(said)
        c.height = top - 8

    formats: dict[str, Kind] = dict.fromkeys((value, *bounds), kind)
    return make_figure(title, caption, data, formats, draw if drawn else None, listing(data, formats))


def _ends(values: list[float]) -> tuple[float, float]:
    return min(values, default=0.0), max(values, default=0.0)


def _cells(
    data: pd.DataFrame, panel: str | None, row: str, series: str, columns: list[str]
) -> dict[tuple[str, str, str], tuple[float, ...]]:
    of = map(str, data[panel]) if panel else iter([""] * len(data))
    keys = zip(of, map(str, data[row]), map(str, data[series]), strict=True)
    return dict(zip(keys, zip(*(numbers(data, k) for k in columns), strict=True), strict=True))


def _lines(references: pd.DataFrame | None, panel: str | None) -> dict[str, list[tuple[str, float, str]]]:
    """Name, value and series of the lines of each panel."""
    lines: dict[str, list[tuple[str, float, str]]] = {}
    if references is not None and len(references):
        of = map(str, references[panel]) if panel else iter([""] * len(references))
        owners = references["series"] if "series" in references else [""] * len(references)
        for at, name, v, owner in zip(of, references["name"], numbers(references, "value"), owners, strict=True):
            if not math.isnan(v):
                lines.setdefault(at, []).append((str(name), v, str(owner)))
    return lines


def _mark(c: Canvas, x: Scale, y: float, cell: tuple[float, ...], index: int, tip: str) -> None:
    hue = mark_class(index)
    if len(cell) == 3 and not any(map(math.isnan, cell)) and cell[1] != cell[2]:
        c.path(f"M{num(x(cell[1]))} {num(y)}H{num(x(cell[2]))}", f"{hue} interval")
    c.mark(x(cell[0]), y, index, f"{hue} dot", tip)


def _legend(c: Canvas, names: list[str], lines: list[str]) -> float:
    """Marks of the series and the reference lines, wrapped; a single series without lines needs none."""
    if len(names) < 2 and not lines:
        return 0.0
    x = y = 0.0
    for i, name in enumerate([*names, *lines]):
        width = text_width(name) + 20
        if x and x + width > c.width:
            x, y = 0.0, y + 18
        if i < len(names):
            c.mark(x + 6, y + 7, i, f"{mark_class(i)} dot")
        else:
            c.path(f"M{num(x + 6)} {num(y)}v14", f"ink rule{_dash(i - len(names))}")
        c.text(x + 16, y + 11, name)
        x += width + 16
    return y + 26


def _dash(index: int) -> str:
    return ("", " dash2", " dash3")[index % 3]
