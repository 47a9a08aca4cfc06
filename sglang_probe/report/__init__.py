"""One self-contained HTML page per run or study: figures as inline SVG, every number also in a table.

Needs neither SGLang nor torch. The pieces: `Page` and `write` (page.py), the figures (figures.py), `Table` and
`format_number` (tables.py), and the same tables on the terminal (terminal.py).
"""

from sglang_probe.report.figures import Figure, dots, grouped_bars, heatmap, lines, request_strips, token_strip
from sglang_probe.report.numbers import Kind, format_interval, format_number
from sglang_probe.report.page import Page, Section, Tile, render, write
from sglang_probe.report.tables import Column, Table

__all__ = [
    "Column",
    "Figure",
    "Kind",
    "Page",
    "Section",
    "Table",
    "Tile",
    "dots",
    "format_interval",
    "format_number",
    "grouped_bars",
    "heatmap",
    "lines",
    "render",
    "request_strips",
    "token_strip",
    "write",
]
