"""The study's numbers are those of a naive loop over positions; its weights make the harvest look like the traffic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sglang_probe.errors import LedgerError
from sglang_probe.run.run import Run
from sglang_probe.studies.coverage import result as result_module
from sglang_probe.studies.coverage import study as study_module
from sglang_probe.studies.coverage import walk as walk_module
from sglang_probe.studies.coverage.result import Map
from sglang_probe.studies.coverage.study import study_coverage
from tests.studies.coverage.conftest import random_traffic
from tests.studies.coverage.naive import naive

FATES = ["computed", "reused", "dropped", "unrequested"]


def segment_of(request: dict[str, Any], position: int, _: int) -> str:
    for s in request["segments"]:
        if s["start"] <= position < s["end"]:
            return s["name"]
    return "generated" if position >= request["prompt_len"] else "unknown"


def bin_of(position: int) -> str:
    low, high = 1, 16
    while position and not low <= position < high:
        low, high = high, high * 2
    return f"{low:,}–{high - 1:,}" if position else "0"


def bins(multiplicities: dict[int, int]) -> dict[str, int]:
    out: dict[str, int] = {}
    for m, n in multiplicities.items():
        top = 1
        while top < m:
            top *= 2
        name = str(m) if m <= 2 else f"{top // 2 + 1:,}–{top:,}"
        out[name] = out.get(name, 0) + n
    return out


def compare(run: Run, m: Map, expected: dict[str, Any], key: Callable[[Any], Any]) -> None:
    """Every number of the map against the naive ones."""
    found = {key(row): row for row in m.classes.to_dict("records")}
    assert {k for k, row in found.items() if row["positions"]} == set(expected["fates"])
    for name, fates in expected["fates"].items():
        row = found[name]
        assert {f: row[f] for f in FATES if row[f]} == dict(fates), name
        assert row["positions"] == sum(fates.values())
        assert row["coverage"] == fates["computed"] / sum(fates.values())
        assert row["contexts"] == expected["contexts"][name], name
        assert row["contexts_in_run"] == expected["contexts_in_run"][name], name
        spread = m.multiplicity[[key(r) == name for r in m.multiplicity.to_dict("records")]]
        assert dict(zip(spread["multiplicity"], spread["rows"], strict=True)) == bins(expected["multiplicity"][name])


@pytest.mark.parametrize("seed", range(100))
def test_every_number_is_that_of_a_naive_loop(
    write_run: Callable[..., Run], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk_module, "BATCH_POSITIONS", 100)  # several batches
    run = write_run(*random_traffic(seed))
    found = study_coverage(run, ["segment"], by="position")
    compare(run, found.map("segment"), naive(run.path, segment_of), lambda row: row["segment"])
    crossed = naive(run.path, lambda r, p, t: (segment_of(r, p, t), bin_of(p)))
    compare(run, found.map("segment x position"), crossed, lambda row: (row["segment"], row["position"]))
    whole = naive(run.path, lambda *_: "all")
    for name in FATES:
        assert found.totals[name] == whole["fates"]["all"][name]
    assert found.totals["contexts"] == whole["contexts"]["all"]
    assert found.totals["contexts_in_run"] == whole["contexts_in_run"]["all"]
    weights = [m for m, n in whole["multiplicity"]["all"].items() for _ in range(n)]
    expected = sum(weights) ** 2 / sum(w * w for w in weights) if weights else 0
    assert found.totals["effective_rows"] == pytest.approx(expected)


def test_the_naive_loop_would_see_a_difference(write_run: Callable[..., Run]) -> None:
    run = write_run(*random_traffic(3))
    found = study_coverage(run)
    expected = naive(run.path, segment_of)
    next(iter(expected["contexts"].keys()))
    expected["contexts"][next(iter(expected["contexts"]))] += 1
    with pytest.raises(AssertionError):
        compare(run, found.map("segment"), expected, lambda row: row["segment"])


@pytest.mark.parametrize("seed", range(10))
def test_weighted_rows_have_the_class_frequencies_of_the_traffic(write_run: Callable[..., Run], seed: int) -> None:
    frame = (
        study_coverage(write_run(*random_traffic(seed)), ["segment"], by="position").map("segment x position").classes
    )
    held = frame[frame["computed"] > 0]
    assert np.allclose(held["computed"] * held["weight"], held["positions"])
    assert frame.loc[frame["computed"] == 0, "weight"].isna().all()


def test_two_requests_with_one_prefix_share_its_contexts_whatever_their_cache_salt(
    write_run: Callable[..., Run],
) -> None:
    requests = [
        {"rid": "a", "prompt_ids": [5, 6, 7], "output_ids": [1]},
        {"rid": "b", "prompt_ids": [5, 6, 8], "output_ids": [1]},
    ]
    spans = [{"rid": r, "start": 0, "end": 3, "phase": "prefill"} for r in "ab"]
    found = study_coverage(write_run(requests, spans))
    assert (found.totals["positions"], found.totals["contexts"]) == (6, 4)


def test_a_context_that_a_later_request_computed_is_in_the_run(write_run: Callable[..., Run]) -> None:
    requests = [{"rid": r, "prompt_ids": [5, 6, 7], "output_ids": [1]} for r in "ab"]
    spans = [
        {"rid": "a", "start": 0, "end": 2, "status": "reused"},  # from before the recording
        {"rid": "a", "start": 2, "end": 3, "phase": "prefill"},
        {"rid": "b", "start": 1, "end": 3, "phase": "prefill"},
        {"rid": "b", "start": 0, "end": 1, "status": "dropped"},
    ]
    found = study_coverage(write_run(requests, spans))
    assert (found.totals["contexts"], found.totals["contexts_in_run"]) == (3, 2)


def test_intervals_hold_the_estimate_narrow_with_more_families_and_need_six(write_run: Callable[..., Run]) -> None:
    def served(families: int) -> Map:
        requests, spans = [], []
        for i in range(families * 4):
            prompt = [1000 + i % families, *range(10 + i % families), 500 + i]
            requests.append({"rid": f"r{i}", "prompt_ids": prompt, "output_ids": [1], "family": f"f{i % families}"})
            requests[-1]["segments"] = [{"name": "shared", "start": 0, "end": len(prompt) - 1}]
            requests[-1]["segments"] += [{"name": "own", "start": len(prompt) - 1, "end": len(prompt)}]
            reused = len(prompt) - 1 if i >= families else 0
            spans += [{"rid": f"r{i}", "start": reused, "end": len(prompt), "phase": "prefill"}]
            if reused:
                origin = {"origin_rid": f"r{i % families}", "origin_attempt": 0}
                spans += [{"rid": f"r{i}", "start": 0, "end": reused, "status": "reused", **origin}]
        return study_coverage(write_run(requests, spans, f"run{families}")).map("segment")

    few, many = (served(n).classes.set_index("segment").loc["shared"] for n in (6, 40))
    for row in (few, many):
        assert row["low"] <= row["log2_ratio"] <= row["high"] < 0
    assert few["high"] - few["low"] > many["high"] - many["low"]
    assert served(5).classes["low"].isna().all()


def test_a_harvest_that_computed_everything_is_not_biased(write_run: Callable[..., Run]) -> None:
    requests = [{"rid": r, "prompt_ids": [5, 6, 7], "output_ids": [1], "family": r} for r in "ab"]
    found = study_coverage(write_run(requests, [{"rid": r, "start": 0, "end": 3, "phase": "prefill"} for r in "ab"]))
    m = found.map("segment")
    assert m.bias.divergence == 0
    assert m.classes["log2_ratio"].tolist() == [0.0]
    assert m.bias.effective_rows == 6


def test_a_class_of_which_nothing_was_computed_is_beyond_repair(write_run: Callable[..., Run]) -> None:
    requests = [{"rid": "a", "prompt_ids": [5, 6, 7], "output_ids": [1, 2]}]
    requests[0]["segments"] = [{"name": "system", "start": 0, "end": 3}]
    spans = [
        {"rid": "a", "start": 0, "end": 3, "status": "reused"},
        {"rid": "a", "start": 3, "end": 4, "phase": "decode"},
    ]
    m = study_coverage(write_run(requests, spans)).map("segment")
    assert m.bias.lost_share == 0.75
    assert m.classes.set_index("segment").loc["system", "log2_ratio"] == -np.inf


def test_spans_that_do_not_tile_are_refused(write_run: Callable[..., Run]) -> None:
    requests = [{"rid": "a", "prompt_ids": [5, 6, 7], "output_ids": [1]}]
    spans = [{"rid": "a", "start": 0, "end": 1}, {"rid": "a", "start": 2, "end": 3}]
    with pytest.raises(LedgerError, match="do not tile"):
        study_coverage(write_run(requests, spans))


def test_a_run_in_which_nothing_was_served_has_no_classes(write_run: Callable[..., Run]) -> None:
    found = study_coverage(write_run([], []), ["segment"], by="position")
    assert found.totals["positions"] == 0
    assert [len(m.classes) for m in found.maps] == [0, 0]


def test_multiplicities_have_a_name_for_every_bin() -> None:
    assert result_module.MULTIPLICITIES[:4] == ["1", "2", "3–4", "5–8"]
    assert study_module._BIN_OF[[1, 2, 3, 4, 5, 8, 9]].tolist() == [0, 1, 2, 2, 3, 3, 4]
