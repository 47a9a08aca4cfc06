"""The terminal shows the tables that pages show."""

from __future__ import annotations

import io

import pandas as pd
from rich.console import Console

from sglang_probe.report.tables import Column, Table
from sglang_probe.report.terminal import print_table


def test_headers_and_cells_are_those_of_the_page_and_no_markup() -> None:
    frame = pd.DataFrame({"arm": ["[red]on[/]"], "share": [0.314], "low": [0.3], "high": [0.33]})
    console = Console(file=io.StringIO(), width=80)
    columns = [Column("arm"), Column("share", "computed", "percent", bounds=("low", "high"))]
    print_table(console, Table(frame, "Coverage", columns=columns))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith(" Coverage")
    assert "computed" in text
    assert "[red]on[/]" in text
    assert "31.4% [30.0%, 33.0%]" in text


def test_a_narrow_terminal_shows_the_first_columns_whole_and_says_that_there_are_more() -> None:
    frame = pd.DataFrame({"arm": ["cache_on"], "verdict": ["equivalent within 0.001"], "effect": [1.25e-5], "n": [9]})
    console = Console(file=io.StringIO(), width=50)
    print_table(console, Table(frame, "Effects", {"effect": "scientific"}))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 50
    assert "Effects (1 more column in the report)" in text
    assert "1.25e-5" in text
