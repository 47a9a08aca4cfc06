"""Numbers as text, and frames as HTML tables.

A printed number never claims more than it is: `100%` and `0%` appear only for exact values (99.97 % reads `>99.9%`),
a small number that would round to zero turns scientific, and a fraction asked to be an integer keeps its fraction.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
from markupsafe import escape

Kind = Literal["auto", "integer", "decimal", "signed", "percent", "scientific", "text"]

MISSING = "\N{EN DASH}"

_EXACT = 1e-12  # a mean of ones may miss 1.0 by rounding; closer than this counts as exact


def format_number(x: object, kind: Kind = "auto", *, digits: int | None = None) -> str:
    """`x` as text.

    Args:
        x: a number; missing values (None, NaN, NA) give an en dash, text is returned as it is.
        kind: `auto` (four significant digits, scientific below 0.001), `integer` (thousands separated), `decimal`
            (three places), `signed` (the same with its sign), `percent` (of a fraction; one place), `scientific` (two
            places; `4.20e-7`, as on axes), or `text` (no separators, for ids).
        digits: places after the point, instead of the kind's default.
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
        case "signed":
            return f"{value:+,.{3 if digits is None else digits}f}"
        case "scientific":
            return _scientific(value, 2 if digits is None else digits)
    if isinstance(x, numbers.Integral):
        return f"{int(x):,}"
    if value.is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if not 1e-3 <= abs(value) < 1e7:
        return _scientific(value, 2)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_interval(low: object, high: object, kind: Kind = "auto", *, digits: int | None = None) -> str:
    """`[low, high]`, or an en dash if one of them is missing."""
    if is_missing(low) or is_missing(high):
        return MISSING
    return f"[{format_number(low, kind, digits=digits)}, {format_number(high, kind, digits=digits)}]"


@dataclass(frozen=True)
class Column:
    """One printed column, made of one to four of the frame's: numbers that belong together stand together.

    A cell reads `value (beside) [low, high]`, e.g. an effect, its floor, and an interval; parts that are missing are
    left out. Without `name` the column is the interval alone.
    """

    name: str = ""
    header: str = ""
    """In words; default: the name, spaces for underscores."""
    kind: Kind = "auto"
    beside: str = ""
    bounds: tuple[str, str] | None = None
    """Names of the columns that hold the ends of the interval."""
    digits: int | None = None

    @property
    def title(self) -> str:
        """What stands above the column."""
        return self.header or self.name.replace("_", " ")


@dataclass(frozen=True)
class Printed:
    """A column as text; `numeric` columns are aligned right."""

    header: str
    cells: list[str]
    numeric: bool


@dataclass(frozen=True)
class Table:
    """A frame to print: one row per row. A named index becomes the first columns.

    `columns` says what is printed, the decisive column first; without it every column is, under its own name.
    """

    frame: pd.DataFrame
    caption: str = ""
    formats: Mapping[str, Kind] = field(default_factory=dict)
    """The kind of number per column where `columns` is not given; other columns are `auto`."""
    columns: Sequence[Column] = ()
    long: bool = False
    """Whether a page folds it away, with the whole frame as CSV beside it."""

    def printed(self) -> list[Printed]:
        """The columns as text."""
        frame = self.frame.reset_index() if any(n is not None for n in self.frame.index.names) else self.frame
        if self.columns:
            return [_print(c, frame) for c in self.columns] if len(frame.columns) else []
        return [
            _print(Column(str(name), str(name), self.formats.get(str(name), "auto")), frame.iloc[:, [i]])
            for i, name in enumerate(frame.columns)
        ]

    def to_html(self) -> str:
        """The `<table>` in a container that scrolls sideways; the caption is left to the page."""
        columns = self.printed()
        if not columns:
            return '<p class="empty">no data</p>'
        css = [' class="n"' if c.numeric else "" for c in columns]
        head = "".join(f'<th scope="col"{a}>{escape(c.header)}</th>' for c, a in zip(columns, css, strict=True))
        rows = [
            "<tr>" + "".join(f"<td{a}>{escape(text)}</td>" for text, a in zip(row, css, strict=True)) + "</tr>"
            for row in zip(*(c.cells for c in columns), strict=True)
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


def _print(column: Column, frame: pd.DataFrame) -> Printed:
    at = {str(name): i for i, name in reversed(list(enumerate(frame.columns)))}
    names = [n for n in (column.name, column.beside, *(column.bounds or ())) if n]
    values = {n: frame.iloc[:, at[n]].tolist() for n in names}
    cells = [_cell(column, {n: values[n][i] for n in names}) for i in range(len(frame))]
    present = [v for n in names for v in values[n] if not is_missing(v)]
    numeric = column.kind != "text" and all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in present)
    return Printed(column.title, cells, numeric and bool(present))


def _cell(column: Column, row: Mapping[str, object]) -> str:
    parts = []
    if column.name:
        if is_missing(row[column.name]):
            return MISSING
        parts.append(format_number(row[column.name], column.kind, digits=column.digits))
    if column.beside and not is_missing(row[column.beside]):
        parts.append(f"({format_number(row[column.beside], column.kind, digits=column.digits)})")
    if column.bounds is not None:
        low, high = (row[n] for n in column.bounds)
        interval = format_interval(low, high, column.kind, digits=column.digits)
        parts += [interval] if interval != MISSING else []
    return " ".join(parts) or MISSING


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
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"


def _is_zero(text: str) -> bool:
    return not text.strip("-0.,")
