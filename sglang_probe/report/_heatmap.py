"""A heatmap: shaded cells with their values, hatched cells where there is none, and a key below."""

from __future__ import annotations

import math

import pandas as pd

from sglang_probe.report._axes import Scale
from sglang_probe.report._figure import Figure, listing, make_figure
from sglang_probe.report._frame import distinct, numbers, select
from sglang_probe.report._svg import Canvas, text_width, wrap
from sglang_probe.report.numbers import Kind, format_number


def heatmap(
    frame: pd.DataFrame,
    row: str,
    column: str,
    value: str,
    *,
    title: str,
    caption: str = "",
    column_label: str = "",
    kind: Kind = "percent",
    missing: str = "no tokens",
) -> Figure:
    """Cells shaded by value, with the value printed where there is room; missing cells are hatched as `missing`.

    Percent cells print the number without its sign; 0 and 100 are printed only for exact values.
    """
    data = select(frame, [row, column, value], unique=[row, column])
    rows, columns = distinct(data[row]), distinct(data[column])
    cells = dict(zip(zip(map(str, data[row]), map(str, data[column]), strict=True), numbers(data, value), strict=True))
    present = [v for v in cells.values() if not math.isnan(v)]
    bottom, top = min([0.0, *present]), max([0.0, *present])
    if kind == "percent" and top <= 1:
        top = 1.0
    shade = Scale(bottom, top, 0.0, 1.0)
    any_missing = len(present) < len(rows) * len(columns)

    def label(v: float) -> str:
        return format_number(v, kind, digits=0).removesuffix("%") if kind == "percent" else format_number(v, kind)

    def draw(c: Canvas) -> None:
        gutter = min(max(map(text_width, rows)) + 12, 0.3 * c.width)
        width, height = (c.width - gutter) / len(columns), 28.0
        size = 12 if max(text_width(label(v), 12) for v in present) + 6 <= width else 10
        printed = max(text_width(label(v), size) for v in present) + 4 <= width
        y = 0.0
        for r in rows:
            names = wrap(r, gutter - 10)
            band = max(height, len(names) * 15.0 + 4)
            c.paragraph(0, y + (band - len(names) * 15) / 2 + 11, names)
            for i, k in enumerate(columns):
                x, v = gutter + i * width, cells.get((r, k), math.nan)
                seam = min(0.75, width / 8)
                box = (x + seam, y + 0.75, width - 2 * seam, band - 1.5)
                if math.isnan(v):
                    c.hatch(*box, "hatch soft", tip=f"{r}, {k}: {missing}")
                    c.rect(*box, "blank")
                    continue
                c.rect(*box, "heat", tip=f"{r}, {k}: {format_number(v, kind)}", opacity=0.04 + 0.96 * shade(v))
                if printed:
                    c.text(x + width / 2, y + band / 2 + 4, label(v), _cell_class(shade(v)), "middle", size)
            y += band
        every = math.ceil((max(text_width(k, 11) for k in columns) + 8) / width)
        for i, k in enumerate(columns):
            if i % every == 0:
                centred = every == 1 or width >= text_width(k, 11)
                x = gutter + i * width + (width / 2 if centred else 0)
                x = x if centred else min(x, c.width - text_width(k, 11))
                c.text(x, y + 15, k, "muted", "middle" if centred else "start", 11)
        y += 22
        if column_label:
            c.text((gutter + c.width) / 2, y + 10, column_label, "muted", "middle", 11)
            y += 20
        ends = (format_number(bottom, kind), format_number(top, kind))
        c.height = _draw_key(c, y + 6, gutter, ends, missing if any_missing else "")

    wide = pd.DataFrame([[cells.get((r, k), math.nan) for k in columns] for r in rows], columns=columns)
    wide.insert(0, row, rows, allow_duplicates=True)
    formats: dict[str, Kind] = dict.fromkeys(columns, kind)
    return make_figure(title, caption, wide, formats, draw if present else None, listing(data, {value: kind}))


def _cell_class(shade: float) -> str:
    """Text that stands out from its cell: on a middling shade that depends on the colour scheme."""
    return "on" if shade > 0.85 else "mid" if shade > 0.65 else ""


def _draw_key(c: Canvas, y: float, x: float, ends: tuple[str, str], missing: str) -> float:
    """The heatmap's key: a shaded bar between its two ends, and the hatch if cells are missing. Gives the y below."""
    low, high = ends
    c.text(x, y + 10, low, "muted", size=11)
    x += text_width(low, 11) + 6
    for i in range(10):
        c.rect(x + 8 * i, y, 8.2, 12, "heat", opacity=0.04 + 0.96 * (i + 0.5) / 10)
    c.text(x + 86, y + 10, high, "muted", size=11)
    x += 86 + text_width(high, 11) + 20
    if missing:
        if x + 22 + text_width(missing, 11) > c.width:
            x, y = 0.0, y + 20
        c.hatch(x, y, 16, 12, "hatch soft")
        c.rect(x, y, 16, 12, "blank")
        c.text(x + 22, y + 10, missing, "muted", size=11)
    return y + 16
