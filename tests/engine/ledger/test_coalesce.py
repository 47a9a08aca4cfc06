"""Coalescing loses nothing and joins what it may."""

from __future__ import annotations

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_probe.engine.ledger.coalesce import coalesce
from sglang_probe.run import schema


def step(
    rid: str, position: int, forward: int, row: int, phase: str = schema.DECODE, under: str | None = None
) -> tuple:
    return (
        rid,
        0,
        position,
        position + 1,
        schema.COMPUTED,
        phase,
        forward,
        -1,
        None,
        row,
        1 if row >= 0 else 0,
        None,
        None,
        under,
    )


def table(facts: list[tuple]) -> pa.Table:
    columns = list(zip(*facts, strict=True))
    return pa.Table.from_arrays(
        [pa.array(c, type=f.type) for c, f in zip(columns, schema.SPANS, strict=True)], schema=schema.SPANS
    )


def expand(spans: pa.Table) -> set[tuple]:
    """(rid, position, forward, row, phase) of every position."""
    out = set()
    for s in spans.to_pylist():
        for i in range(s["end"] - s["start"]):
            forward = s["forward_id"] + (i if s["phase"] in schema.STEP_PHASES else 0)
            row = s["row_start"] + i * s["row_step"] if s["row_start"] >= 0 else -1
            out.add((s["rid"], s["start"] + i, forward, row, s["phase"]))
    return out


def test_steady_decoding_of_a_batch_becomes_one_span_per_request() -> None:
    steps = [step(r, 10 + i, 5 + i, 100 + 3 * i + b) for i in range(20) for b, r in enumerate("abc")]
    spans = coalesce(table(steps)).to_pylist()
    assert [(s["rid"], s["start"], s["end"], s["row_step"]) for s in spans] == [(r, 10, 30, 3) for r in "abc"]


def test_a_forward_in_between_cuts_the_run() -> None:
    spans = coalesce(table([step("a", 10, 5, -1), step("a", 11, 6, -1), step("a", 12, 8, -1)])).to_pylist()
    assert [(s["start"], s["end"], s["forward_id"]) for s in spans] == [(10, 12, 5), (12, 13, 8)]


def test_an_overshoot_is_not_joined_to_the_decode_before_it() -> None:
    spans = coalesce(table([step("a", 10, 5, -1), step("a", 11, 6, -1, schema.OVERSHOOT)]))
    assert spans["phase"].to_pylist() == [schema.DECODE, schema.OVERSHOOT]


def test_steps_are_not_joined_across_the_onset_of_an_intervention() -> None:
    facts = [step("a", p, p, -1, under=None if p < 3 else "one" if p < 5 else "two") for p in range(7)]
    joined = coalesce(table(facts)).to_pandas()
    assert list(zip(joined["start"], joined["end"], strict=True)) == [(0, 3), (3, 5), (5, 7)]
    assert joined["intervention"].fillna("").tolist() == ["", "one", "two"]


def test_prefill_spans_pass_through() -> None:
    prefill = ("a", 0, 0, 10, schema.COMPUTED, schema.PREFILL, 0, 0, None, 0, 1, None, None, None)
    spans = coalesce(table([prefill, step("a", 10, 1, 10), step("a", 11, 2, 11)]))
    assert expand(spans) == expand(table([prefill, step("a", 10, 1, 10), step("a", 11, 2, 11)]))
    assert spans.num_rows == 2


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=5, unique=True), min_size=1, max_size=30),
    st.booleans(),
)
def test_any_sequence_of_batches_keeps_every_position(batches: list[list[str]], rows: bool) -> None:
    position: dict[str, int] = {}
    facts, row = [], 0
    for forward, batch in enumerate(batches):
        for rid in batch:
            facts.append(step(rid, position.get(rid, 10), forward, row if rows else -1))
            position[rid] = position.get(rid, 10) + 1
            row += 1
    before = table(facts)
    after = coalesce(before)
    assert expand(after) == expand(before)
    # Joined as a greedy reader would: never more runs than one position at a time, and no two that could be one.
    assert after.num_rows == _greedy_runs(facts, rows)


def _greedy_runs(facts: list[tuple], rows: bool) -> int:
    runs = 0
    by_rid: dict[str, list[tuple]] = {}
    for f in facts:
        by_rid.setdefault(f[0], []).append(f)
    for steps in by_rid.values():
        length, gap = 0, 0
        for i, s in enumerate(steps):
            new_gap = s[9] - steps[i - 1][9] if i else 0
            if length and s[6] == steps[i - 1][6] + 1 and (length == 1 or new_gap == gap):
                gap = new_gap
                length += 1
            else:
                runs += 1
                length = 1
    return runs
