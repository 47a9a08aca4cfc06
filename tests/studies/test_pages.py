"""What pages of all studies share: checks collapse to a sentence, and a violation is never collapsed."""

from __future__ import annotations

from sglang_probe.report.page import Page, render
from sglang_probe.studies.pages import checks_in_words, facts, proof
from sglang_probe.verify.check import Check


def checks(violation: str | None = None) -> dict[str, list[Check]]:
    holding = [Check("tiling", "spans tile", 3, "requests"), Check("content", "rows are theirs", 50, "rows")]
    return {"on": holding, "off": [holding[0], Check("content", "rows are theirs", 40, "rows", violation)]}


def test_checks_that_hold_are_one_sentence_and_a_folded_table() -> None:
    assert checks_in_words(checks()) == "2 checks in each of 2 runs: all hold"
    assert checks_in_words({"on": checks()["on"]}) == "2 checks in 1 run: all hold"
    section = proof(checks(), "More.")
    assert section.text.startswith("2 checks in each of 2 runs: all hold.")
    assert section.text.endswith("More.")
    (table,) = section.tables
    assert table.long
    assert table.frame["covered"].tolist() == [6, 90]
    assert not section.notes


def test_a_violation_is_shown_with_its_run() -> None:
    section = proof(checks("row 7 belongs to nobody"))
    assert checks_in_words(checks("v")) == "2 checks in each of 2 runs: 1 violated"
    assert not section.tables[0].long
    html = render(Page("t", sections=[section]))
    assert "<td>off</td><td>content</td><td>row 7 belongs to nobody</td>" in html
    assert "Do not use these numbers" in html


def test_facts_of_a_live_segment_say_what_its_manifest_says() -> None:
    told = {
        "model": {"name": "m", "weight_hash": "a" * 64},
        "versions": {"sglang": "1", "torch": "2"},
        "created": "now",
    }
    assert facts(told) == [("model", "m"), ("engine", "SGLang 1, torch 2"), ("recorded", "now")]
    model = {"name": "m", "architecture": "Llama", "layers": 4}
    assert facts({**told, "model": model, "rows_dtype": "float32"})[0] == (
        "model",
        "m (Llama, 4 layers), rows in float32",
    )
