"""Frames as HTML tables: numbers that belong together in one cell, and what was left out said below."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
from markupsafe import escape

from sglang_probe.report.numbers import MISSING, Kind, format_interval, format_number, is_missing

__all__ = [
    "MISSING",
    "MOST_ROWS",
    "Column",
    "Kind",
    "Printed",
    "Table",
    "format_interval",
    "format_number",
    "is_missing",
]

MOST_ROWS = 400
"""A longer table prints so many rows and says how many there are; the files of the table have all."""


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

    @property
    def title(self) -> str:
        """What stands above the column."""
        return self.header or self.name.replace("_", " ")

    def there(self, frame: pd.DataFrame) -> bool:
        """Whether it is printed: an interval may be absent, and a frame without rows may have no columns."""
        if self.name:
            return self.name in frame.columns or len(frame) > 0
        return all(n in frame.columns for n in self.bounds or ())


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
    """Whether a page folds it away."""
    file: str = ""
    """Name of the file in `tables/` that has the whole frame, without its suffix; a page links to it."""

    def printed(self) -> list[Printed]:
        """The columns as text."""
        frame = self.frame.reset_index() if any(n is not None for n in self.frame.index.names) else self.frame
        if self.columns:
            return [_print(c, frame) for c in self.columns if c.there(frame)]
        return [
            _print(Column(str(name), str(name), self.formats.get(str(name), "auto")), frame.iloc[:, [i]])
            for i, name in enumerate(frame.columns)
        ]

    def to_html(self) -> str:
        """The `<table>` in a container that scrolls sideways; the caption is left to the page."""
        columns = replace(self, frame=self.frame.head(MOST_ROWS)).printed()
        if not columns:
            return '<p class="empty">no data</p>'
        css = [' class="n"' if c.numeric else "" for c in columns]
        head = "".join(f'<th scope="col"{a}>{escape(c.header)}</th>' for c, a in zip(columns, css, strict=True))
        rows = [
            "<tr>" + "".join(f"<td{a}>{escape(text)}</td>" for text, a in zip(row, css, strict=True)) + "</tr>"
            for row in zip(*(c.cells for c in columns), strict=True)
        ]
        body = "\n".join(rows) or f'<tr><td class="empty" colspan="{len(columns)}">no data</td></tr>'
        if len(self.frame) > MOST_ROWS:
            more = f"{MOST_ROWS:,} of {len(self.frame):,} rows are shown; the files below have all"
            body += f'\n<tr><td class="empty" colspan="{len(columns)}">{more}</td></tr>'
        label = escape(self.caption or "numbers")
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">\n<table>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
        )


def _print(column: Column, frame: pd.DataFrame) -> Printed:
    at = {str(name): i for i, name in reversed(list(enumerate(frame.columns)))}
    names = [n for n in (column.name, column.beside, *(column.bounds or ())) if n]
    if column.name and column.name not in at:
        raise ValueError(f"no column {column.name!r}; the frame has {', '.join(at)}")
    values = {n: frame.iloc[:, at[n]].tolist() if n in at else [None] * len(frame) for n in names}
    cells = [_cell(column, {n: values[n][i] for n in names}) for i in range(len(frame))]
    present = [v for n in names for v in values[n] if not is_missing(v)]
    numeric = column.kind != "text" and all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in present)
    return Printed(column.title, cells, numeric and bool(present))


def _cell(column: Column, row: Mapping[str, object]) -> str:
    parts = []
    if column.name:
        if is_missing(row[column.name]):
            return MISSING
        parts.append(format_number(row[column.name], column.kind))
    if column.beside and not is_missing(row[column.beside]):
        parts.append(f"({format_number(row[column.beside], column.kind)})")
    if column.bounds is not None:
        low, high = (row[n] for n in column.bounds)
        interval = format_interval(low, high, column.kind)
        parts += [interval] if interval != MISSING else []
    return " ".join(parts) or MISSING
