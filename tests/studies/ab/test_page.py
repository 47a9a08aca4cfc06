"""The report of arms: decisive columns first and in words, long tables folded, nothing stated that was not measured."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sglang_probe.report.page import render
from sglang_probe.studies.ab.page import ab_page
from sglang_probe.studies.ab.study import AbResult
from sglang_probe.studies.ab.tables import coverage_table, effects_table
from sglang_probe.studies.floor import EFFECT, FLOOR, floor_table
from sglang_probe.verify.check import Check

DEEP = "blocks.3.hook_resid_post"


def sums(arms: tuple[str, ...], families: int = 6) -> pd.DataFrame:
    """Effects of arms that differ from `off` twice as much as `off` from itself; `same` does not differ."""
    rows = []
    for hook_point in ("hook_embed", DEEP):
        for arm in (*arms, "off"):
            for kind, size in ((EFFECT, 2e-3), (FLOOR, 1e-3)):
                if kind == FLOOR or arm != "off":
                    moved = hook_point != "hook_embed" and arm != "same"
                    values = size * (1 + 0.01 * np.arange(families)) * 10 * moved
                    rows += [
                        {"hook_point": hook_point, "phase": "prefill", "cluster": i, "n": 10, "same": 10 - 9 * moved}
                        | {"sum": v, "kind": kind, "arm": arm, "comparison": f"{arm} {kind}"}
                        for i, v in enumerate(values)
                    ]
    return pd.DataFrame(rows)


def result(arms: tuple[str, ...] = ("on",), *, source: str = "jsonl", violation: str | None = None) -> AbResult:
    names = [*arms, "off"]
    counts = {"requests": 2, "prompt_tokens": 40, "computed": 10, "reused": 30, "generated": 4, "decode_steps": 2}
    counts |= {"overshoot": 0, "recomputed": 0, "sglang_cached_tokens": 30, "requests_reconciled": 2}
    totals = [{"run": n, "arm": n, **counts, "seconds": 1.0, "tokens_per_second": 44.0} for n in names]
    segments = [
        {"arm": n, "segment": s, "positions": 20, "computed": c, "reused": 20 - c, "coverage": c / 20}
        for n in names
        for s, c in (("system", 0), ("user", 10), ("all", 5))
    ]
    positions = [
        {"arm": n, "start": 0, "end": 32, "positions": 40, "computed": 10, "reused": 30, "coverage": 0.25}
        for n in names
    ]
    manifest: dict[str, Any] = {
        "model": {"name": "m", "architecture": "A", "layers": 4},
        "versions": {"sglang-probe": "1", "sglang": "2", "torch": "3"},
        "workload": {"source": source},
        "rows_dtype": "bfloat16",
        "created": "today",
        "workload_digest": "0" * 64,
        "requests_expected": 2,
        "concurrency": 4,
    }
    drift = pd.DataFrame(
        [
            {"comparison": "on vs off", "kind": EFFECT, "hook_point": DEEP, "phase": "prefill", "identical": 0.1}
            | {"l2_median": 1e-3, "l2_p99": 2e-3, "l2_max": 4e-3, "cosine_min": 0.9, "deviation_max": 1.0}
            | {"positions": 60}
        ]
    )
    floors = floor_table(sums(arms), "off")
    return AbResult(
        name="made",
        totals=pd.DataFrame(totals),
        by_segment=pd.DataFrame(segments),
        by_position=pd.DataFrame(positions),
        baseline="off",
        drift=drift,
        floors=floors,
        by_class=floors.assign(segment="user"),
        by_bin=floors.assign(start=0),
        flips=pd.DataFrame(),
        checks={n: [Check("tiling", "spans tile", 2, "requests", violation)] for n in names},
        manifests=dict.fromkeys(names, manifest),
        example={
            "rid": "r0",
            "strips": {n: [(0, 15, "reused"), (15, 20, "computed")] for n in names},
            "segments": [(0, 20, "user")],
            "arm": names[0],
            "reuses": True,
            "related": True,
            "requests": {f"request {i}": [(0, 15, "reused"), (15, 20, "computed")] for i in range(3)},
        },
    )


def test_the_verdict_and_what_it_rests_on_come_first() -> None:
    printed = effects_table(result()).printed()
    assert [c.header for c in printed][:6] == [
        "arm",
        "phase",
        "verdict",
        "effect (floor)",
        "effect minus floor, 95 %",
        "q, Benjamini-Hochberg",
    ]
    cells = [c.cells[0] for c in printed]
    assert cells[2] == "above the floor"
    assert cells[3] == "2.05e-3 (1.03e-3)"
    assert re.fullmatch(r"\[1\.0\de-3, 1\.0\de-3\]", cells[4])


def test_an_arm_that_is_bit_identical_everywhere_takes_one_row() -> None:
    frame = effects_table(result(("on", "same"))).frame
    assert frame[["arm", "phase", "verdict"]].to_numpy().tolist() == [
        ["on", "prefill", "above the floor"],
        ["same", "all", "bit-identical at every hook point"],
    ]


@pytest.mark.parametrize(("arms", "first"), [(("on",), "segment"), (("a", "b", "c"), "arm")])
def test_coverage_runs_down_the_longer_side(arms: tuple[str, ...], first: str) -> None:
    assert coverage_table(result(arms)).printed()[0].header == first


def test_no_header_is_a_python_name_and_long_tables_are_folded() -> None:
    html = render(ab_page(result()))
    body = re.sub(r"<details>.*?</details>|<p class=\"folded\">.*?</p>", "", html, flags=re.DOTALL)
    headers = re.findall(r"<th[^>]*>(.*?)</th>", body)
    assert headers
    assert [h for h in headers if "_" in h] == []
    for title in ("Effect and floor at every hook point", "Every comparison of two runs"):
        assert title in html
        assert title not in body


def test_the_page_says_only_what_was_measured() -> None:
    html = render(ab_page(result(source="shared_prefix")))
    assert "positions not computed" in html
    assert "forward passes skipped" not in html
    assert "shared machine" not in html
    assert "shared prefixes" not in html
    assert "the cache cuts" not in html


def test_arms_without_captured_rows_have_a_page_too() -> None:
    found = replace(result(), floors=pd.DataFrame(), by_class=pd.DataFrame(), by_bin=pd.DataFrame())
    html = render(ab_page(replace(found, drift=found.drift.iloc[:0])))
    assert "no rows were captured" in html
    assert "positions not computed" in html


def test_a_violated_invariant_is_on_the_page() -> None:
    assert "Do not use these numbers" not in render(ab_page(result()))
    assert "Do not use these numbers" in render(ab_page(result(violation="a gap")))


def test_a_floor_above_the_effect_is_an_alarm_and_no_verdict() -> None:
    turned = sums(("on",)).assign(kind=lambda f: f["kind"].map({EFFECT: FLOOR, FLOOR: EFFECT}))
    turned = turned[(turned["kind"] == FLOOR) | (turned["arm"] == "on")]
    html = render(ab_page(replace(result(), floors=floor_table(turned, "off"))))
    assert "alarm: the floor exceeds the effect" in html
    assert "No policy can do that" in html
    assert "No policy can do that" not in render(ab_page(result()))
