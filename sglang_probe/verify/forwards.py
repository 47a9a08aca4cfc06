"""Forward passes: none missing or doubled, in order, and each computed what the spans say, in every column."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from sglang_probe.run import schema
from sglang_probe.run.damage import read_table
from sglang_probe.run.run import Run
from sglang_probe.verify import segment
from sglang_probe.verify.check import Check
from sglang_probe.verify.frames import is_step, joined_at_marks, last_forward

Array = np.ndarray[Any, Any]

CLOCK = 1.0
"""Seconds by which the machine's clock may be set back during a recording."""


def forwards_add_up(run: Run) -> Check:
    """The computed spans of each forward pass give its tokens by phase, its KV slots, its requests and its rows."""
    name = "forwards"
    claim = "forward passes follow each other, and the spans of each give its requests, tokens, KV slots and rows"
    forwards, spans = run.forwards(), run.spans()
    violation = None
    if forwards.empty:
        computed = spans[spans["status"].isin((schema.COMPUTED, schema.REUSED))]
        violation = (
            f"spans of {computed['rid'].iloc[0]} were computed, and no forward is in the run" if len(computed) else None
        )
    violation = violation or _parts(run)
    for rank, mine in forwards.groupby("dp_rank"):
        ours = spans[spans["dp_rank"] == rank]
        violation = (
            violation
            or _numbers(run, mine, ours)
            or _times(mine, _begun(run))
            or _sums(mine, ours)
            or _rows(run, mine, ours)
        )
    if violation is None and len(strange := spans[~spans["dp_rank"].isin(forwards["dp_rank"])]):
        violation = f"spans of {strange['rid'].iloc[0]} are of a rank without forward passes" if len(forwards) else None
    lost = int(forwards["unaccounted"].fillna(0).sum())
    note = f"{lost} positions belong to requests that could not be accounted for" if lost else None
    return Check(name, claim, len(forwards), "forwards", violation, note)


def _parts(run: Run) -> str | None:
    """Each part of the journal ends with the forward pass that it says, and numbered a row for each of its slots."""
    rank, before = -1, 0
    for part in run.parts():
        if part.dp_rank != rank:
            rank, before = part.dp_rank, part.dp_rank << schema.RANK_SHIFT
        rows = 0
        for file in (f for f in part.files if f.startswith("ledger/forwards-")):
            asked = pa.schema([schema.FORWARDS.field(n) for n in ("forward_id", "slots", "unaccounted")])
            table = read_table(run.path / file, asked, added=("unaccounted",))
            before = int(pc.max(table["forward_id"]).as_py()) + 1
            rows = int(pc.sum(table["slots"]).as_py()) - (pc.sum(table["unaccounted"]).as_py() or 0)
        if part.forwards_end != before:
            return f"part {part.number} ends before forward {part.forwards_end}, says the journal, and before {before}"
        if part.rows != (rows if run.hook_points else 0):
            return f"part {part.number} numbered {part.rows} rows, says the journal, and its forward passes {rows}"
    return None


def _numbers(run: Run, forwards: pd.DataFrame, spans: pd.DataFrame) -> str | None:
    """Numbers rise by one, but where a live recording dropped facts; spans name those that are there."""
    ids = forwards["forward_id"].to_numpy(np.int64)
    turns = np.flatnonzero(np.diff(ids) != 1)
    first, last = int(ids.min()), int(ids.max())
    dropped = bool((spans["status"] == schema.DROPPED).any())
    for i in turns:
        if ids[i + 1] <= ids[i]:
            return f"forward {ids[i + 1]} comes after forward {ids[i]}: it is there twice, or the order was changed"
        if not dropped:
            return f"forward {ids[i] + 1} is missing"
    live = segment.of(run)
    begins = (int(forwards["dp_rank"].iloc[0]) << schema.RANK_SHIFT) if live is None else 0
    # A recording that begins again after a stop goes on with its numbers.
    begun = live is None or (live.get("first_of_process") and live.get("number") == 0)
    if begun and first != begins and not dropped:
        return f"forward {begins} is missing: the first one is {first}"
    asked = spans[spans["status"].isin((schema.COMPUTED, schema.REUSED))]
    ends = np.where(asked["status"] == schema.COMPUTED, last_forward(asked), asked["forward_id"])
    known = np.zeros(last - first + 1, dtype=bool)
    known[ids - first] = True
    missing = np.concatenate([[0], np.cumsum(~known)])
    low, high = asked["forward_id"].to_numpy(np.int64), ends.astype(np.int64)
    outside = (low < first) | (high > last)
    a, b = np.clip(low - first, 0, len(known)), np.clip(high - first + 1, 0, len(known))
    bad = outside | (missing[b] > missing[a])
    if bad.any():
        s = asked.iloc[int(np.argmax(bad))]
        forward = high[np.argmax(bad)] if low[np.argmax(bad)] >= first else low[np.argmax(bad)]
        return f"{s['rid']} positions {s['start']} to {s['end']}: forward {forward} is not in the run"
    return None


def _begun(run: Run) -> set[int]:
    """Numbers of the first forward pass of each engine that went on with a run after another."""
    parts = run.parts()
    return {a.forwards_end for a, b in pairwise(parts) if a.dp_rank == b.dp_rank and a.session != b.session}


def _times(forwards: pd.DataFrame, begun: set[int]) -> str | None:
    """Launches and ends are in the order of the numbers. A clock may be set back a little; and by any time between two
    engines: each goes by the clock as it was when it began."""
    ids, launched = forwards["forward_id"].to_numpy(), forwards["launched"].to_numpy()
    ended = launched + forwards["seconds"].to_numpy()
    for what, at in (("was launched", launched), ("was processed", ended)):
        earlier = (np.diff(at) < -CLOCK) & ~np.isin(ids[1:], list(begun))
        if earlier.any():
            i = int(np.argmax(earlier))
            return f"forward {ids[i + 1]} {what} before forward {ids[i]}, says the clock"
    return None


def per_forward(spans: pd.DataFrame, first: int, count: int) -> tuple[Array, Array, Array]:
    """Prefill tokens, decode tokens and requests of forwards `first .. first + count`, each `[count]`.

    Step spans spread over consecutive forwards.
    """
    computed = spans[spans["status"] == schema.COMPUTED]
    length = (computed["end"] - computed["start"]).to_numpy(np.int64)
    forward = computed["forward_id"].to_numpy(np.int64) - first
    steps = is_step(computed)
    prefill = np.bincount(forward[~steps], weights=length[~steps], minlength=count).astype(np.int64)
    prefills = np.bincount(forward[~steps], minlength=count)
    edges = np.zeros(count + 1, dtype=np.int64)
    np.add.at(edges, forward[steps], 1)
    np.add.at(edges, forward[steps] + length[steps], -1)
    decode = np.cumsum(edges)[:count]
    return prefill[:count], decode, prefills[:count] + decode


def _sums(forwards: pd.DataFrame, spans: pd.DataFrame) -> str | None:
    ids = forwards["forward_id"].to_numpy(np.int64)
    first = int(ids.min())
    spans = joined_at_marks(spans)
    prefill, decode, requests = (x[ids - first] for x in per_forward(spans, first, int(ids.max()) - first + 1))
    lost = forwards["unaccounted"].fillna(0).to_numpy(np.int64)
    for what, found, column, said in (
        ("tokens", prefill + decode + lost, "slots", "SGLang allocated"),
        ("tokens of prefills", prefill, "prefill_tokens", "it says"),
        ("decode steps", decode, "decode_tokens", "it says"),
        ("requests", requests, "requests", "it says"),
    ):
        expected = forwards[column].to_numpy()
        # Of requests that could not be accounted for nobody knows which phase their positions were of.
        wrong = np.where((lost > 0) & (column != "slots"), found > expected, found != expected)
        if (bad := np.flatnonzero(wrong)).size:
            i = bad[0]
            return f"forward {ids[i]}: spans hold {found[i]} {what}, {said} {expected[i]}"
    return None


def _rows(run: Run, forwards: pd.DataFrame, spans: pd.DataFrame) -> str | None:
    """Rows of a forward pass are numbered from its `row_start`, forward after forward, and its spans own them."""
    ids, begin = forwards["forward_id"].to_numpy(np.int64), forwards["row_start"].to_numpy(np.int64)
    if not run.hook_points:
        if (begin != -1).any():
            return f"forward {ids[np.argmax(begin != -1)]} has rows, and this run captured none"
        return None
    slots = (forwards["slots"] - forwards["unaccounted"].fillna(0)).to_numpy(np.int64)
    follows = np.concatenate([begin[:1], begin[:-1] + slots[:-1]])
    wrong = (begin != follows) & (np.diff(ids, prepend=ids[0] - 1) == 1)
    wrong[0] |= begin[0] < 0
    if wrong.any():
        i = int(np.argmax(wrong))
        return f"forward {ids[i]}: its rows begin at {begin[i]}, after those of the one before at {follows[i]}"
    computed = spans[spans["status"] == schema.COMPUTED]
    at = np.full(int(ids.max() - ids.min()) + 1, -1, dtype=np.int64)
    at[ids - ids.min()] = np.arange(len(ids))
    length = (computed["end"] - computed["start"]).to_numpy(np.int64)
    steps = is_step(computed)
    pieces = np.where(steps, length, 1)  # one forward each
    own = np.repeat(np.arange(len(computed)), pieces)
    into = np.arange(len(own)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    forward = at[computed["forward_id"].to_numpy(np.int64)[own] + into - ids.min()]
    row = computed["row_start"].to_numpy(np.int64)[own] + into * computed["row_step"].to_numpy(np.int64)[own]
    last = row + np.where(steps, 1, length)[own]
    bad = (row < begin[forward]) | (last > begin[forward] + slots[forward])
    if bad.any():
        i = int(np.argmax(bad))
        s = computed.iloc[own[i]]
        return (
            f"{s['rid']} position {s['start'] + into[i]}: row {row[i]} is not one of forward {ids[forward[i]]}, whose "
            f"rows are {begin[forward[i]]} to {begin[forward[i]] + slots[forward[i]]}"
        )
    return None
