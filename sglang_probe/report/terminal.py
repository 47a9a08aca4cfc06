"""Tables on the terminal: the same `Table` that a page prints."""

from __future__ import annotations

from rich import box
from rich import table as rich_table
from rich.console import Console
from rich.text import Text

from sglang_probe.report.tables import Table


def print_table(console: Console, table: Table) -> None:
    """Print a table, its caption above it."""
    out = rich_table.Table(
        title=Text(table.caption, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    columns = table.printed()
    for c in columns:
        out.add_column(Text(c.header), justify="right" if c.numeric else "left", overflow="fold")
    for row in zip(*(c.cells for c in columns), strict=True):
        out.add_row(*map(Text, row))
    console.print(out)
