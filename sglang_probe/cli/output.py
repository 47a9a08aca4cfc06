"""Tables on the terminal."""

from __future__ import annotations

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table


def print_frame(console: Console, frame: pd.DataFrame, title: str, formats: dict[str, str] | None = None) -> None:
    """Print a frame. `formats` maps columns to a format spec; shares (`coverage`, `identical`) are shown in percent."""
    formats = {"coverage": ".1%", "identical": ".1%", **(formats or {})}
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    for column in frame.columns:
        numeric = pd.api.types.is_numeric_dtype(frame[column])
        table.add_column(str(column), justify="right" if numeric else "left")
    for record in frame.to_dict("records"):
        table.add_row(*(_cell(value, formats.get(str(column))) for column, value in record.items()))
    console.print(table)


def _cell(value: object, spec: str | None) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return "-"
    if spec:
        return format(value, spec)
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
