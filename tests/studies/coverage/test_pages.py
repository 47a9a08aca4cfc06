"""Pages and cards of runs: text of the workload is text wherever it is written, and no run is too small for a page."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from sglang_probe.report import markdown
from sglang_probe.report.page import render
from sglang_probe.run.run import Run
from sglang_probe.studies.ab.page import ab_page
from sglang_probe.studies.ab.study import study_ab
from sglang_probe.studies.coverage.card import write_card
from sglang_probe.studies.coverage.page import coverage_page
from sglang_probe.studies.coverage.study import study_coverage
from sglang_probe.studies.coverage.words import card_text

EVIL = "<script>alert(1)</script> | a `tick` ``` [l](javascript:x)\n\n# head | **b** &amp; \\| _x_ ~~s~~"
MANIFEST: dict[str, Any] = {
    "model": {"name": "m", "architecture": "A", "layers": 4},
    "versions": {"sglang-probe": "1", "sglang": "2", "torch": "3"},
    "workload": {"source": "jsonl"},
    "workload_digest": "0" * 64,
    "rows_dtype": "bfloat16",
    "dtype": "bfloat16",
    "created": "today",
    "arm": "on",
    "policy": {"cache": True},
    "concurrency": 4,
    "requests_expected": 2,
    "rows": 0,
    "rows_dropped": 0,
    "lines_skipped": 0,
}


def request(rid: str, prompt: int = 6, output: int = 1, name: str = "user", family: str | None = "f") -> dict[str, Any]:
    segments = [{"name": name, "start": 0, "end": prompt}] if prompt else []
    ids = list(range(100, 100 + prompt))
    return {"rid": rid, "prompt_ids": ids, "output_ids": [1] * output, "segments": segments, "family": family}


def prefill(rid: str, start: int = 0, end: int = 6, **fields: Any) -> dict[str, Any]:
    return {"rid": rid, "start": start, "end": end, "phase": "prefill", **fields}


def reused(rid: str, end: int) -> dict[str, Any]:
    return {"rid": rid, "start": 0, "end": end, "status": "reused", "origin_rid": "a", "origin_attempt": 0}


RUNS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "one token, prefilled": ([request("a", 1)], [prefill("a", 0, 1)]),
    "prefill alone": ([request("a"), request("b")], [prefill("a"), reused("b", 5), prefill("b", 5)]),
    "no family": ([request("a", family=None), request("b", family=None)], [prefill("a"), prefill("b")]),
    "nothing computed": ([request("a")], [{**reused("a", 6), "origin_rid": None}]),
    "refused": ([request("a"), request("b", output=0)], [prefill("a")]),
    "class of the sum's name": ([request("a", name="all"), request("b")], [prefill("a"), prefill("b")]),
    "markup": ([request("a", name=EVIL, family=EVIL), request("b")], [prefill("a"), prefill("b")]),
    "many families": (
        [request(f"r{i}", family=f"f{i}") for i in range(200)],
        [prefill(f"r{i}") for i in range(200)],
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_every_run_has_pages_and_cards(case: str, write_run: Callable[..., Run]) -> None:
    runs = {name: write_run(*RUNS[case], name, **MANIFEST) for name in ("on", "off")}
    found = [study_coverage(run, by="position") for run in runs.values()]
    pages = [
        coverage_page(found[:1]),
        coverage_page(found),
        ab_page(study_ab(runs, {"on": "on", "off": "off"}, "pair")),
    ]
    write_card(runs["on"])
    cards = [(runs["on"].path / "README.md").read_text(), card_text(found[0])]
    for text in [*map(render, pages), *cards]:
        shown = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
        assert "<script" not in shown.lower()
        assert not re.search(r">[^<>]*\b(nan|None|NaT)\b[^<>]*<", shown)
    for text in cards:
        for block in re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE):
            rows = [re.findall(r"(?<!\\)\|", line) for line in block.splitlines()]
            assert len({len(r) for r in rows}) == 1, block


def test_a_pair_of_prefills_has_a_strip_without_what_was_generated(write_run: Callable[..., Run]) -> None:
    """One new token: it is sampled and never run, so that nothing stands after the prompt."""
    runs = {name: write_run(*RUNS["prefill alone"], name, **MANIFEST) for name in ("on", "off")}
    found = study_ab(runs, {"on": "on", "off": "off"}, "pair")
    assert found.example["segments"] == [(0, 6, "user")]
    assert found.example["requests"] == {
        "request 0": [(0, 6, "computed")],
        "request 1": [(0, 5, "reused"), (5, 6, "computed")],
    }
    html = render(ab_page(found))
    assert "how far rows differ between arms is not known" in html
    assert "nothing to show, because no rows were captured" in html


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("user", "`user`"),
        ("blocks.3.hook_resid_post", "`blocks.3.hook_resid_post`"),
        ("{'cache': True}", "`{'cache': True}`"),
        ("a|b", "<code>a&#124;b</code>"),
        ("a`b", "<code>a&#96;b</code>"),
        ("<b>", "<code>&#60;b&#62;</code>"),
        ("a\n\n# b", "<code>a &#35; b</code>"),
        (" a", "<code>a</code>"),
        ("\x1b[31mred", "<code>&#91;31mred</code>"),
    ],
)
def test_code_in_markdown_holds_any_text(text: str, code: str) -> None:
    assert markdown.code(text) == code


def test_running_text_in_markdown_is_one_line_without_markup() -> None:
    assert not re.search(r"[<>|`*_\[\]\\\n]", markdown.escape(EVIL))
    assert markdown.escape("plain, 3.5 % of it") == "plain, 3.5 % of it"
