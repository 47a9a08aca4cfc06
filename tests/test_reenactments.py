"""`experiments/reenactments/RESULT.md` against its summary: every figure of its tables, and of what-if."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.run.causes import CAUSES

FOLDER = Path(__file__).parents[1] / "experiments" / "reenactments"
RESULT = (FOLDER / "RESULT.md").read_text(encoding="utf-8")
SUMMARY: dict[str, Any] = json.loads((FOLDER / "summary.json").read_text(encoding="utf-8"))
LOST = ("timestamp", "tools", "marker", "salt", "burst", "cache", "page", "router")
"""Situations in the order of the first table."""
NEW = "not seen in this segment"


def rows(heading: str) -> list[list[str]]:
    """Cells of the table of a section, without its head."""
    part = RESULT.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def share(x: float) -> str:
    return f"{x:.1%}".replace("%", " %") if x else "0 %"


@pytest.mark.parametrize("name", LOST)
def test_a_row_of_lost_reuse_has_the_figures_of_its_situation(name: str) -> None:
    table = rows("Lost reuse")
    assert len(table) == len(LOST)
    _, _, cause, before, after, saved = table[LOST.index(name)]
    told = SUMMARY[name]
    first, then = told["before"], told["after"]
    again = {c: n for c, n in first["causes"].items() if c != NEW}
    assert (before, after) == (share(first["share"]), share(then["share"]))
    assert saved == f"{first['computed'] - then['computed']:,} of {sum(again.values()):,}"
    numbers = [int(n.replace(",", "")) for n in re.findall(r"\(([\d,]+)\)", cause)]
    if name == "router":
        assert numbers == [first["causes"][NEW], first["causes"]["diverged"]]
        return
    remedy = first["first_remedy"]
    assert (numbers, cause) == ([remedy["tokens"]], f"{remedy['what']} ({remedy['tokens']:,})")
    assert remedy["what"].split(":")[0] in CAUSES


def test_every_segment_sums_exactly_and_holds_as_the_text_says() -> None:
    parts = [part for told in SUMMARY.values() for part in told.values() if isinstance(part, dict) and "causes" in part]
    assert len(parts) > 2 * len(LOST)
    assert all(p["sums_exactly"] and p["violations"] == [] for p in parts)


def test_what_if_has_the_figures_that_were_predicted_and_those_that_were_measured() -> None:
    cache, page, router = (SUMMARY[name] for name in ("cache", "page", "router"))
    pairs = [
        (cache["predicted"], cache["after"]),
        (page["predicted"], page["after"]),
        (router["predicted_before"], router["before"]),
        (router["predicted"], router["after"]),
    ]
    said = RESULT.split("**What-if")[1].split("\n\n")[0]
    found = re.findall(r"(\d[\d,]+\d)(?: tokens predicted)? and (\d[\d,]+\d)", said)
    assert found == [(f"{p['reused']:,}", f"{m['reused']:,}") for p, m in pairs]
    assert sum(p["matches_that_differ"] for p, _ in pairs) == 0
    one = cache["other_remedy"]
    assert f"{share(one['share'])} ({one['reused']:,} tokens)" in said
    assert f"({page['before']['reused']:,} tokens)" in RESULT.split("**A fault of ours")[1]


def test_rows_of_wrong_reuse_have_the_verdicts_and_figures_of_their_gates() -> None:
    gates = [*SUMMARY["flips"]["gates"].values(), *SUMMARY["cancels"]["gates"].values()]
    table = rows("Wrong reuse")
    assert len(table) == len(gates) + len(SUMMARY["audit"]["audits"])
    for (_, _, verdict, wrong, largest, _), gate in zip(table, gates, strict=False):
        assert verdict == gate["verdict"]
        most = max(p["most"] for p in gate["paths"])
        assert float(largest.split(";")[0]) == pytest.approx(most, rel=0.02)
        of = 2 * gate["cases"]
        if not gate["wrong_by_path"]:
            assert wrong.split(";")[0] == f"none of {of * len(gate['paths'])}"
        for path, n in gate["wrong_by_path"].items():
            assert re.search(rf"`{path}` {n} of {of}\b", wrong)
        if flips := max(p["flips"] for p in gate["paths"]):
            assert "flips" not in largest or share(flips) in largest
        assert sum(gate["wrong_by_path"].values()) == gate["origins_named"]
    for (_, _, verdict, told, *_), one in zip(table[len(gates) :], SUMMARY["audit"]["audits"].values(), strict=True):
        assert f"exit code {one['exit_code']}" in verdict
        for what in ("right", "wrong", "too early", "gone"):
            if n := one["found"].get(what):
                assert re.search(rf"\b{n} {what}", told)


def test_no_word_was_left_to_be_filled_in() -> None:
    known = {"WITHIN", "FLOOR", "WRONG", "REUSE", "RESULT"}
    assert set(re.findall(r"\b[A-Z]{5,}\b", RESULT)) <= known
    assert not re.search(r"\{\w*\}|\bTODO\b|\?\?", RESULT)
