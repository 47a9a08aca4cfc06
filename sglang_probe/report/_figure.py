"""What every figure function gives back, and the one place that makes it: both drawings, or "no data" in both."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from sglang_probe.report._svg import NARROW, WIDE, Canvas, num
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
    folded: bool = False
    """Whether a page shows its title alone until it is opened."""

    def standalone(self, *, margin: int = 16) -> str:
        """The wide drawing as an SVG file of its own, with the colours of the pages, light or dark as the reader's."""
        css = Path(__file__).with_name("figure.css").read_text(encoding="utf-8")
        found = re.search(r'viewBox="0 0 (\S+) (\S+)"', self.svg)
        assert found is not None
        width, height = (float(x) + 2 * margin for x in found.groups())
        paper = (
            f'<rect x="{-margin}" y="{-margin}" width="{num(width)}" height="{num(height)}" style="fill:var(--paper)"/>'
        )
        head = f'xmlns="http://www.w3.org/2000/svg" viewBox="{-margin} {-margin} {num(width)} {num(height)}"'
        # After title and description, which belong at the head.
        svg = self.svg.replace(found[0], head, 1)
        return svg.replace("</desc>", f"</desc><style>{css}</style>{paper}", 1) + "\n"


def fold(figure: Figure) -> Figure:
    """The figure, folded away: a map of hundreds of cells beside the curve that says what is in it."""
    return replace(figure, folded=True)


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
