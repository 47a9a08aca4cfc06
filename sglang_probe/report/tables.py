"""Numbers as text, and frames as HTML tables.

A printed number never claims more than it is: `100%` and `0%` appear only for exact values (99.97 % reads `>99.9%`),
a small number that would round to zero turns scientific, and a fraction asked to be an integer keeps its fraction.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from markupsafe import escape

Kind = Literal["auto", "integer", "decimal", "percent", "scientific", "text"]

MISSING = "\N{EN DASH}"

_EXACT = 1e-12  # a mean of ones may miss 1.0 by rounding; closer than this counts as exact


def format_number(x: object, kind: Kind = "auto", *, digits: int | None = None) -> str:
    """`x` as text.

    Args:
        x: a number; missing values (None, NaN, NA) give an en dash, text is returned as it is.
        kind: `auto` (four significant digits, scientific below 0.001), `integer` (thousands separated), `decimal`
            (three places), `percent` (of a fraction; one place), `scientific`, or `text` (no separators, for ids).
        digits: places after the point, instead of the default of `decimal`, `percent` or `scientific`.
    """
    if is_missing(x):
        return MISSING
    if isinstance(x, bool | np.bool_):
        return "yes" if x else "no"
    if kind == "text" or not isinstance(x, numbers.Real):
        return str(x)
    value = float(x)
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    match kind:
        case "percent":
            return _percent(value, 1 if digits is None else digits)
        case "decimal":
            text = f"{value:,.{3 if digits is None else digits}f}"
            return _scientific(value, 2) if value and _is_zero(text) else text.removeprefix("-" if not value else "")
        case "scientific":
            return _scientific(value, 2 if digits is None else digits)
    if isinstance(x, numbers.Integral):
        return f"{int(x):,}"
    if value.is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if not 1e-3 <= abs(value) < 1e7:
        return _scientific(value, 2)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Table:
    """A frame to print: one row per row, columns in order. A named index becomes the first columns.

    `formats` gives the kind of number per column; other columns are `auto`.
    """

    frame: pd.DataFrame
    caption: str = ""
    formats: Mapping[str, Kind] = field(default_factory=dict)

    def to_html(self) -> str:
        """The `<table>` in a container that scrolls sideways; the caption is left to the page."""
        frame = self.frame.reset_index() if any(n is not None for n in self.frame.index.names) else self.frame
        if not len(frame.columns):
            return '<p class="empty">no data</p>'
        columns = [_Column(str(name), frame.iloc[:, i].tolist(), self.formats) for i, name in enumerate(frame.columns)]
        head = "".join(f'<th scope="col"{c.css}>{escape(c.name)}</th>' for c in columns)
        rows = [
            "<tr>" + "".join(f"<td{c.css}>{escape(c.cells[i])}</td>" for c in columns) + "</tr>"
            for i in range(len(frame))
        ]
        body = "\n".join(rows) or f'<tr><td class="empty" colspan="{len(columns)}">no data</td></tr>'
        label = escape(self.caption or "numbers")
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">\n<table>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
        )


def is_missing(x: object) -> bool:
    """None, NaN, NaT or NA."""
    return x is None or x is pd.NA or x is pd.NaT or (isinstance(x, numbers.Real) and math.isnan(float(x)))


class _Column:
    """One column, formatted; `css` right-aligns it if it holds numbers."""

    def __init__(self, name: str, values: list[Any], formats: Mapping[str, Kind]) -> None:
        kind = formats.get(name, "auto")
        present = [v for v in values if not is_missing(v)]
        numeric = kind != "text" and all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in present)
        self.name = name
        self.css = ' class="n"' if numeric and present else ""
        self.cells = [format_number(v, kind) for v in values]


def _percent(value: float, digits: int) -> str:
    for exact in (0.0, 1.0):
        if abs(value - exact) < _EXACT * exact or value == exact:
            return f"{exact:.0%}"
    text = f"{value * 100:,.{digits}f}"
    step = 10.0**-digits
    if _is_zero(text):
        return f"<{step:.{digits}f}%" if value > 0 else f">-{step:.{digits}f}%"
    if text == f"{100:.{digits}f}":
        return f">{100 - step:.{digits}f}%" if value < 1 else ">100%"
    return f"{text}%"


def _scientific(value: float, digits: int) -> str:
    return f"{value:.{digits}e}" if value else "0"


def _is_zero(text: str) -> bool:
    return not text.strip("-0.,")
