"""Tables on the terminal: the same `Table` that a page prints, as many of its columns as fit."""

from __future__ import annotations

from rich import box
from rich import table as rich_table
from rich.console import Console
from rich.text import Text

from sglang_probe.report.tables import Printed, Table

_EDGES, _GAP = 2, 3
_WIDEST_TEXT = 32
"""Longer texts are broken at words."""


def print_table(console: Console, table: Table) -> None:
    """Print a table, its caption above it. The last columns are left out where the terminal is too narrow for them."""
    columns = table.printed()
    widths = _widths(columns, console.width)
    left_out = len(columns) - len(widths)
    more = f" ({left_out} more column{'s' if left_out > 1 else ''} in the report)" if left_out else ""
    out = rich_table.Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for c, width in zip(columns, widths, strict=False):
        out.add_column(Text(c.header), justify="right" if c.numeric else "left", width=width)
    for row in zip(*(c.cells for c in columns[: len(widths)]), strict=True):
        out.add_row(*map(Text, row))
    # As a title of the table it would be broken at the table's width.
    console.print(Text(f" {table.caption.replace('`', '')}{more}", style="bold"))
    console.print(out)


def _widths(columns: list[Printed], room: int) -> list[int]:
    """Widths of the columns that fit, at least two of them; what is left goes to those whose words would be broken."""
    least = [_least(c) for c in columns]
    fitting = 0
    while fitting < len(least) and sum(least[: fitting + 1]) + _GAP * fitting + _EDGES + 2 <= room:
        fitting += 1
    widths = least[: max(fitting, 2)]
    left = room - sum(widths) - _GAP * (len(widths) - 1) - _EDGES - 2
    for i, c in enumerate(columns[: len(widths)]):
        more = max(0, min(max(map(len, [c.header, *c.cells])) - widths[i], left))
        widths[i], left = widths[i] + more, left - more
    return widths


def _least(column: Printed) -> int:
    """Its longest number, its text up to a limit, and the longest word of its header."""
    cells = max((len(text) for text in column.cells), default=1)
    return max(cells if column.numeric else min(cells, _WIDEST_TEXT), *map(len, column.header.split()), 1)
