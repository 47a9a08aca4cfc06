"""Tables on the terminal: the same `Table` that a page prints, as many of its columns as fit."""

from __future__ import annotations

from rich import box
from rich import table as rich_table
from rich.console import Console
from rich.text import Text

from sglang_probe.report.tables import Printed, Table

_EDGES, _GAP = 4, 3
_WIDEST_TEXT = 32
"""Longer texts are broken at words."""


def print_table(console: Console, table: Table) -> None:
    """Print a table, its caption above it. The last columns are left out where the terminal is too narrow for them."""
    columns = table.printed()
    fits = _fitting([_width(c) for c in columns], console.width)
    fitting = max(2, fits)
    more = len(columns) - fitting
    caption = table.caption.replace("`", "") + (f" ({more} more columns in the report)" if more > 0 else "")
    out = rich_table.Table(
        title=Text(caption, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    for c in columns[:fitting]:
        least = _width(c) if fits >= 2 else None
        out.add_column(Text(c.header), justify="right" if c.numeric else "left", min_width=least)
    for row in zip(*(c.cells for c in columns[:fitting]), strict=True):
        out.add_row(*map(Text, row))
    console.print(out)


def _width(column: Printed) -> int:
    """What a column needs: its longest cell, texts up to a limit, and the longest word of its header."""
    cells = max((len(text) for text in column.cells), default=1)
    return max(cells if column.numeric else min(cells, _WIDEST_TEXT), *map(len, column.header.split()), 1)


def _fitting(widths: list[int], room: int) -> int:
    taken = _EDGES - _GAP
    for i, width in enumerate(widths):
        taken += width + _GAP
        if taken > room:
            return i
    return len(widths)
