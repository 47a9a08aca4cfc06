"""Sections of the evidence pages are what their scripts print of the numbers that stand there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: runpy.run_path(str(ROOT / "bench" / f"{name}.py"))


def _section(heading: str) -> str:
    page = (ROOT / "docs/evidence/benchmarks.md").read_text()
    return page.split(f"## {heading}\n\n", 1)[1].split("\n## ", 1)[0].strip()


def _rows(text: str) -> list[list[str]]:
    """Cells of a table, without its head."""
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")][2:]


def test_the_cost_of_a_monitor_and_of_a_clamp_is_what_the_script_prints(bench: Any) -> None:
    script = bench("monitor")
    text = _section(script["HEADING"])
    inside, outside = script["INSIDE"], script["OUTSIDE"]
    servers = [("monitor", "live"), (outside, "live"), (inside, "live"), (inside, outside)]
    rows = [(*server, cells[1]) for server, cells in zip(servers, _rows(text), strict=True)]
    rounds = int(re.search(r"(\d+) rounds", text)[1])  # type: ignore[index]
    assert script["section"](text.split(". `python", 1)[0], rounds, rows) == text


def test_the_parts_of_a_step_are_what_the_script_prints(bench: Any) -> None:
    text = _section("What a monitor and a clamp do in a step, timed alone")
    told = {what: float(each) for what, each in _rows(text)}
    assert bench("monitor_parts")["section"](text.split(". `python", 1)[0], told) == text
