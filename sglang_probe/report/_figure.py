"""What every figure function gives back, and the one place that makes it: both drawings, or "no data" in both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pandas as pd

from sglang_probe.report._svg import NARROW, WIDE, Canvas
from sglang_probe.report.numbers import Kind, format_number


@dataclass(frozen=True)
class Figure:
    """Two drawings of the same numbers, of which the page shows one: `svg` in wide columns, `svg_narrow` on phones."""

    title: str
    caption: str
    svg: str
    svg_narrow: str
    data: pd.DataFrame
    formats: Mapping[str, Kind] = field(default_factory=dict)
    drawn: bool = True
    """False where there is nothing to draw."""


def make_figure(
    title: str,
    caption: str,
    data: pd.DataFrame,
    formats: Mapping[str, Kind],
    draw: Callable[[Canvas], None] | None,
    description: str,
) -> Figure:
    drawings = []
    for css, width in (("wide", WIDE), ("narrow", NARROW)):
        canvas = Canvas(width)
        if draw:
            draw(canvas)
        else:
            canvas.rect(0.5, 0.5, width - 1, 71, "gap")
            canvas.text(width / 2, 40, "no data", "none", "middle")
            canvas.height = 72
        drawings.append(canvas.svg(css, title, description if draw else "no data"))
    return Figure(title, caption, drawings[0], drawings[1], data, formats, draw is not None)


def listing(data: pd.DataFrame, formats: Mapping[str, Kind], limit: int = 24) -> str:
    """The numbers as a sentence, for readers who do not see the drawing."""
    shown = [
        ", ".join(format_number(v, formats.get(str(k), "text")) for k, v in zip(data.columns, row, strict=True))
        for row in data.head(limit).itertuples(index=False)
    ]
    more = f"; and {len(data) - limit} more, in the table" if len(data) > limit else ""
    return "; ".join(shown) + more + "."
