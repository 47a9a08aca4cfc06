"""Grouped horizontal bars. Wide drawings name a category beside its bars, narrow ones above them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pandas as pd

from sglang_probe.report._axes import Scale
from sglang_probe.report._figure import Figure, listing, make_figure
from sglang_probe.report._frame import distinct, interval_columns, numbers, select
from sglang_probe.report._heatmap import heatmap
from sglang_probe.report._svg import WIDE, Canvas, num, series_class, text_width, wrap
from sglang_probe.report.numbers import Kind, format_number

MOST_SERIES = 6
"""There are so many colours."""


def grouped_bars(
    frame: pd.DataFrame,
    category: str,
    series: str,
    value: str,
    *,
    title: str,
    caption: str = "",
    kind: Kind = "auto",
    unit: str = "",
    low: str | None = None,
    high: str | None = None,
) -> Figure:
    """Horizontal bars, one group per category and one bar per series, each labelled with its value.

    Categories and series keep their order in the frame, or that of a categorical column. Percent bars run on a track
    from 0 to 100 %, so that what is missing shows as well. `low` and `high` name the columns of an interval, drawn as a
    whisker. More series than colours become a heatmap.
    """
    bounds = interval_columns(low, high)
    data = select(frame, [category, series, value], unique=[category, series], bounds=bounds)
    categories, names = distinct(data[category]), distinct(data[series])
    if len(names) > MOST_SERIES:
        down, across = (series, category) if len(categories) <= len(names) else (category, series)
        return heatmap(data, down, across, value, title=title, caption=caption, kind=kind, missing="no value")
    keys = zip(map(str, data[category]), map(str, data[series]), strict=True)
    cells = dict(zip(keys, zip(*(numbers(data, k) for k in (value, *bounds)), strict=True), strict=True))
    drawn = [x for cell in cells.values() for x in cell if not math.isnan(x)]
    bottom, top = min([0.0, *drawn]), max([0.0, *drawn])
    if kind == "percent" and top <= 1:
        top = 1.0

    def label(x: float) -> str:
        return "no value" if math.isnan(x) else _with_unit(x, kind, unit)

    def draw(c: Canvas) -> None:
        first = c.legend([(name, f"{series_class(i)} fill") for i, name in enumerate(names)]) if len(names) > 1 else 0.0
        wide = c.width == WIDE
        gutter = min(max(map(text_width, categories)) + 14, 0.34 * c.width) if wide else 0.0
        texts = [label(cells.get((text, name), (math.nan,))[0]) for text in categories for name in names]
        right = c.width - max(text_width(text, bold=True) for text in texts) - 12
        x = Scale(bottom, top, gutter, right)
        bar, gap = 12, 4
        block = len(names) * (bar + gap) - gap
        y = first + 2
        for text in categories:
            rows = wrap(text, gutter - 12 if wide else c.width)
            if wide:
                height = max(block, len(rows) * 15.0)
                c.paragraph(0, y + (height - len(rows) * 15) / 2 + 11, rows)
                y_bar = y + (height - block) / 2
            else:
                c.paragraph(0, y + 11, rows, "strong")
                y_bar = y + len(rows) * 15 + 2
                height = y_bar - y + block
            c.line(x(0), y_bar - 2, x(0), y_bar + block + 2, "axis")
            for i, name in enumerate(names):
                cell = cells.get((text, name), (math.nan,))
                if kind == "percent":
                    c.rect(x(0), y_bar, x(1) - x(0), bar, "track")
                end = _draw_bar(c, x, y_bar, bar, cell, i, f"{text}, {name}: ", label)
                c.text(end + 6, y_bar + bar / 2 + 4.2, label(cell[0]), "none" if math.isnan(cell[0]) else "strong")
                y_bar += bar + gap
            y += height + (14 if wide else 16)
        y -= 14 if wide else 16
        c.height = y + 4

    formats: dict[str, Kind] = dict.fromkeys((value, *bounds), kind)
    return make_figure(title, caption, data, formats, draw if drawn else None, listing(data, formats))


def _draw_bar(
    c: Canvas,
    x: Scale,
    y: float,
    height: float,
    cell: tuple[float, ...],
    index: int,
    name: str,
    label: Callable[[float], str],
) -> float:
    """A bar from zero and its whisker; gives the x where its label may start."""
    value, *interval = cell
    if math.isnan(value):
        return x(0)
    left, right = sorted((x(0), x(value)))
    c.rect(left, y, right - left, height, f"bar {series_class(index)} fill", tip=name + label(value))
    if index > 1 and right - left > 1:  # in grey, colours from the third on are alike
        c.hatch(left, y, right - left, height, "stripes", pitch=(5.0, 9.0, 3.0, 14.0)[index % 4])
    if interval and not any(map(math.isnan, interval)) and interval[0] != interval[1]:
        low, high = x(interval[0]), x(interval[1])
        middle = y + height / 2
        c.path(f"M{num(low)} {num(middle - 3)}v6M{num(low)} {num(middle)}H{num(high)}m0 -3v6", "whisker")
        right = max(right, high)
    return right


def _with_unit(x: float, kind: Kind, unit: str) -> str:
    return f"{format_number(x, kind)} {unit}".rstrip()
