"""Every page is a page, whatever its study found: nothing, one thing, no number, or more than a screen holds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sglang_probe.report.page import Page, render
from sglang_probe.studies.ab.lossless_page import lossless_page
from sglang_probe.studies.ab.page import ab_page
from sglang_probe.studies.evict.page import eviction_page
from sglang_probe.studies.factorial.page import factorial_page
from sglang_probe.studies.phase.page import phase_page
from sglang_probe.studies.query_drift.page import drift_page
from sglang_probe.studies.row_counts.page import row_counts_page
from sglang_probe.studies.sae_gap.page import gap_page
from sglang_probe.studies.sae_hybrid.page import hybrid_page
from sglang_probe.studies.sae_overlap.page import overlap_page
from sglang_probe.studies.sae_stability.page import stability_page
from tests.studies import made_dictionaries as dictionaries
from tests.studies import made_results as made

PAGES: dict[str, tuple[Callable[..., Any], Callable[[Any], Page]]] = {
    "ab": (made.ab, ab_page),
    "lossless": (made.lossless, lossless_page),
    "phase": (made.phase, phase_page),
    "row-counts": (made.row_counts, row_counts_page),
    "drift": (made.drift, drift_page),
    "factorial": (made.factorial, factorial_page),
    "evict": (made.evict, eviction_page),
    "sae-gap": (made.sae_gap, gap_page),
    "sae-overlap": (dictionaries.overlap, overlap_page),
    "sae-stability": (dictionaries.stability, stability_page),
    "sae-hybrid": (dictionaries.hybrid, hybrid_page),
}
ONE: dict[str, dict[str, Any]] = {
    "ab": {"arms": 2, "families": 1, "replicates": False},
    "lossless": {"layers": 0},
    "phase": {"layers": 0},
    "row-counts": {"layers": 0, "counts": 1},
    "drift": {"layers": 1, "heads": 1, "prompts": 2, "steps": 1},
    "factorial": {"prompts": 1},
    "evict": {"methods": 1, "prompts": 1, "layers": 1, "heads": 1},
    "sae-gap": {"texts": 2, "steps": 8, "spliced": []},
    "sae-overlap": {"latents": 0, "dictionaries": 0},
    "sae-stability": {"dictionaries": 1, "segments": 1, "seeds": 1},
    "sae-hybrid": {"shares": 1},
}
HUGE: dict[str, dict[str, Any]] = {
    "ab": {"arms": 19, "families": 200},
    "lossless": {"layers": 30},
    "phase": {"layers": 30},
    "row-counts": {"layers": 30, "counts": 64},
    "drift": {"layers": 30, "heads": 9},
    "factorial": {"layers": 30},
    "evict": {"methods": 19, "layers": 30, "heads": 9},
    "sae-gap": {"texts": 40, "steps": 500},
    "sae-overlap": {"latents": 4000, "dictionaries": 9},
    "sae-stability": {"dictionaries": 12, "segments": 9, "seeds": 3},
    "sae-hybrid": {"shares": 9},
}


@pytest.fixture(scope="module")
def ordinary() -> dict[str, Any]:
    return {name: make() for name, (make, _) in PAGES.items()}


def _nothing(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame()


def _no_rows(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.iloc[:0]


def _one_row(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.iloc[:1]


def _no_numbers(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(**{c: np.nan for c in frame.columns if pd.api.types.is_float_dtype(frame[c])})


def _no_intervals(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns=[c for c in frame.columns if str(c).endswith(("_low", "_high"))])


@pytest.mark.parametrize("spoil", [_nothing, _no_rows, _one_row, _no_numbers, _no_intervals])
@pytest.mark.parametrize("study", PAGES)
def test_a_table_that_lacks_its_rows_or_numbers_never_costs_the_page(
    study: str, spoil: Callable[[pd.DataFrame], pd.DataFrame], ordinary: dict[str, Any]
) -> None:
    # One table after the other for two of them; all at once for each.
    each = spoil in (_nothing, _no_numbers)
    cases = _spoiled(ordinary[study], spoil) if each else [("all", _all_spoiled(ordinary[study], spoil))]
    for what, found in cases:
        html = render(PAGES[study][1](found))
        assert not _broken(html), what


@pytest.mark.parametrize("study", PAGES)
def test_what_was_measured_once_and_what_fills_no_screen_have_pages(study: str) -> None:
    make, page = PAGES[study]
    for shape in (ONE[study], HUGE[study]):
        html = render(page(make(**shape)))
        assert not _broken(html)
        assert html.index('class="answer"') < html.index("<section")


@pytest.mark.parametrize(
    ("name", "title", "folded"),
    [("drift", "Excess drift by layer", 2), ("phase", "by layer of", 0), ("evict", "recall by layer, budget", 2)],
)
def test_many_layers_are_an_axis_and_their_maps_are_folded(name: str, title: str, folded: int) -> None:
    make, page = PAGES[name]
    for layers, there in ((2, False), (30, True)):
        found = page(make(layers=layers, **({"heads": 9} if folded else {})))
        figures = [f for s in found.sections for f in s.figures] + ([found.picture] if found.picture else [])
        assert any(title in f.title for f in figures) is there
        assert sum(f.folded for f in figures) == (folded if there else 0)
        assert render(found).count("folded, not printed") == (folded if there else 0)


def test_many_layers_of_two_arms_have_a_page() -> None:
    assert "floor, by layer of" in render(ab_page(made.ab(layers=30)))
    assert not _broken(render(ab_page(made.ab(layers=30))))


def test_an_eviction_that_generated_nothing_is_judged_by_attention() -> None:
    html = render(eviction_page(made.evict(engine=False)))
    assert not _broken(html)
    assert "nothing was generated from what is kept" in html


@pytest.mark.parametrize("study", PAGES)
def test_what_cannot_be_shown_says_why(study: str, ordinary: dict[str, Any]) -> None:
    html = render(PAGES[study][1](_all_spoiled(ordinary[study], _nothing)))
    assert not _broken(html)
    assert "nothing to show, because" in html.lower()


@pytest.mark.parametrize("study", PAGES)
def test_headers_are_words_and_no_caveat_is_about_another_model(study: str, ordinary: dict[str, Any]) -> None:
    html = render(PAGES[study][1](ordinary[study]))
    headers = re.findall(r"<th[^>]*>(.*?)</th>", re.sub(r"<summary>Numbers in.*?</details>", "", html, flags=re.DOTALL))
    assert headers
    assert [h for h in headers if "_" in h and not h.startswith(("arm_", "method_"))] == []
    assert "the model is small" not in html


def _spoiled(found: Any, spoil: Callable[[pd.DataFrame], pd.DataFrame]) -> Iterator[tuple[str, Any]]:
    """The result with one of its tables spoiled, each in turn, and with all of them."""
    for name, frame in made.frames_of(found).items():
        yield name, replace(found, **{name: spoil(frame)})
    for field in ("found", "outcomes"):
        inner = getattr(found, field, None)
        for name, frame in made.frames_of(inner).items() if inner is not None else ():
            yield name, replace(found, **{field: _with(inner, name, spoil(frame))})
    yield "all", _all_spoiled(found, spoil)


def _all_spoiled(found: Any, spoil: Callable[[pd.DataFrame], pd.DataFrame]) -> Any:
    changes: dict[str, Any] = {name: spoil(frame) for name, frame in made.frames_of(found).items()}
    for field in ("found", "outcomes"):
        if (inner := getattr(found, field, None)) is not None:
            for name, frame in made.frames_of(inner).items():
                inner = _with(inner, name, spoil(frame))
            changes[field] = inner
    return replace(found, **changes)


def _with(inner: Any, name: str, frame: pd.DataFrame) -> Any:
    return {**inner, name: frame} if isinstance(inner, dict) else replace(inner, **{name: frame})


def _broken(html: str) -> list[str]:
    """Texts that show a number or an object that no one formatted."""
    shown = re.findall(r">([^<>]+)<", re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))
    return [t for t in shown if re.search(r"\b(nan|None|NaT|inf|<NA>|Series|float64)\b", t)]
