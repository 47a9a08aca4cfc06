"""A run whose tables are read once for all checks, and what several of them compute from its spans.

Whole ledgers are compared here as arrays of integers: spans and pieces of spans, never a Python object a position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sglang_probe.hashing import GOLDEN, mix64
from sglang_probe.run import journal, schema
from sglang_probe.run.damage import reading
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.run import Run
from sglang_probe.run.tokens import tokens_of

Array = np.ndarray[Any, Any]


def joined_at_marks(spans: pd.DataFrame) -> pd.DataFrame:
    """Spans sorted by request, attempt and start, without the cut where an intervention begins within one prefill
    chunk: the two pieces are one again, with the mark of the first."""
    spans = spans.sort_values(["rid", "attempt", "start"], kind="stable", ignore_index=True)
    computed = ((spans["status"] == schema.COMPUTED) & (spans["chunk"] >= 0)).to_numpy()
    same = np.logical_and.reduce(
        [spans[c].to_numpy()[1:] == spans[c].to_numpy()[:-1] for c in ("rid", "attempt", "forward_id", "chunk")]
    )
    marked = spans["intervention"].notna().to_numpy()
    touches = spans["start"].to_numpy()[1:] == spans["end"].to_numpy()[:-1]
    second = np.append(False, same & touches & computed[1:] & computed[:-1] & marked[1:] & ~marked[:-1])
    if not second.any():
        return spans
    ends = spans["end"].to_numpy().copy()
    at = np.flatnonzero(second)
    ends[at - 1] = ends[at]
    return spans.assign(end=ends)[~second].reset_index(drop=True)


class ReadOnce(Run):
    """A run that reads each of its tables once. What it returns must not be changed in place."""

    def __init__(self, run: Run) -> None:
        self.path, self.manifest = run.path, run.manifest
        self._run = run
        self._read: dict[str, Any] = {}

    def _once(self, name: str, read: Callable[[], Any]) -> Any:
        if name not in self._read:
            self._read[name] = read()
        return self._read[name]

    def parts(self) -> list[journal.Part]:
        parts: list[journal.Part] = self._once("parts", self._run.parts)
        return parts

    def spans(self) -> pd.DataFrame:
        return self._once("spans", self._run.spans)

    def forwards(self) -> pd.DataFrame:
        return self._once("forwards", self._run.forwards)

    def rebinds(self) -> pd.DataFrame:
        return self._once("rebinds", self._run.rebinds)

    def tree(self) -> pd.DataFrame:
        return self._once("tree", self._run.tree)

    def interventions(self) -> pd.DataFrame:
        return self._once("interventions", self._run.interventions)

    def budget(self) -> pd.DataFrame:
        return self._once("budget", self._run.budget)

    def gates(self) -> pd.DataFrame:
        return self._once("gates", self._run.gates)

    def engine_requests(self) -> pd.DataFrame:
        return self._once("engine", self._run.engine_requests)

    def last_attempt(self) -> pd.DataFrame:
        return self._once("last", self._run.last_attempt)

    def requests(self, *, interrupted: bool = False) -> pd.DataFrame:
        return self._once(f"requests {interrupted}", lambda: self._run.requests(interrupted=interrupted))

    def tokens_of(self, rid: str) -> pd.DataFrame:
        return self._once(f"tokens {rid}", lambda: tokens_of(self, rid))


def is_step(spans: pd.DataFrame) -> Array:
    """Spans each of whose positions has a forward pass of its own."""
    return np.isin(spans["phase"].to_numpy(object), schema.STEP_PHASES)


def last_forward(spans: pd.DataFrame) -> Array:
    """The forward pass that computed the last position of each computed span."""
    length = (spans["end"] - spans["start"]).to_numpy(np.int64)
    return spans["forward_id"].to_numpy(np.int64) + is_step(spans) * (length - 1)


@dataclass(frozen=True)
class Pieces:
    """What of asked intervals lies in which computed span: `[start[i], end[i])` of `asked[i]` in `span[i]`."""

    asked: Array
    span: Array
    start: Array
    end: Array

    def covered(self, asked: int) -> Array:
        """Positions of each asked interval that some span computed."""
        return np.bincount(self.asked, weights=self.end - self.start, minlength=asked).astype(np.int64)

    def forwards(self, spans: pd.DataFrame) -> Array:
        """The forward pass that computed the last position of each piece."""
        computed = spans.iloc[self.span]
        into = self.end - 1 - computed["start"].to_numpy(np.int64)
        return computed["forward_id"].to_numpy(np.int64) + is_step(computed) * into


def computed_pieces(spans: pd.DataFrame, rid: pd.Series, attempt: Array, start: Array, end: Array) -> Pieces:
    """Cut intervals `[start, end)` of requests and attempts along the computed spans that hold them.

    Computed spans of one attempt must not overlap.
    """
    place = np.flatnonzero((spans["status"] == schema.COMPUTED).to_numpy())
    computed = spans.iloc[place]
    names = pd.Index(computed["rid"].unique())
    key = _key(names.get_indexer(computed["rid"]), computed["attempt"].to_numpy(), computed["start"].to_numpy())
    order = np.argsort(key, kind="stable")
    key, place = key[order], place[order]
    first, last = computed["start"].to_numpy(np.int64)[order], computed["end"].to_numpy(np.int64)[order]
    code = names.get_indexer(rid)
    start, end = start.astype(np.int64), end.astype(np.int64)
    low = np.searchsorted(key, _key(code, attempt, start), side="right") - 1
    high = np.searchsorted(key, _key(code, attempt, end - 1), side="right") - 1
    low = np.maximum(low, 0)
    count = np.where((code >= 0) & (end > start), np.maximum(high - low + 1, 0), 0)
    asked = np.repeat(np.arange(len(count)), count)
    at = np.repeat(low, count) + np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    a, b = np.maximum(first[at], start[asked]), np.minimum(last[at], end[asked])
    good = (a < b) & (key[at] >> 32 == _key(code, attempt, start)[asked] >> 32)
    return Pieces(asked[good], place[at[good]], a[good], b[good])


def _key(code: Array, attempt: Array, position: Array) -> Array:
    return (code.astype(np.int64) << 12 | attempt.astype(np.int64)) << 32 | position.astype(np.int64)


class Prefixes:
    """A hash of the tokens before each position of each request of `requests.parquet`, prompt and output."""

    def __init__(self, run: Run) -> None:
        path = run.path / REQUESTS_FILE
        with reading(path):
            table = pq.ParquetFile(path).read(columns=["rid", "prompt_ids", "output_ids"])
            prompt, p_len = _flat(table["prompt_ids"])
            output, o_len = _flat(table["output_ids"])
        o_len = np.where(p_len > 0, o_len, 0) if len(p_len) else o_len  # without a prompt its place is unknown
        self._names = pd.Index(table["rid"].to_pylist())
        self.length = p_len + o_len
        self._offset = np.cumsum(self.length) - self.length
        ids = np.zeros(int(self.length.sum()), dtype=np.int64)
        self.known = bool(len(prompt))
        _place(ids, self._offset, prompt, p_len)
        kept = np.repeat(p_len > 0, _flat_lengths(table["output_ids"]))
        _place(ids, self._offset + p_len, output[kept], o_len)
        inside = np.arange(len(ids)) - np.repeat(self._offset, self.length)
        with np.errstate(over="ignore"):
            words = mix64(ids.astype(np.uint64) + (inside.astype(np.uint64) + np.uint64(1)) * GOLDEN)
            self._sum = np.concatenate([np.zeros(1, np.uint64), np.cumsum(words, dtype=np.uint64)])

    def same(self, mine: pd.Series, theirs: pd.Series, end: Array) -> Array:
        """Whether two requests have the same first `end` tokens, as far as both are known."""
        a, b = self._names.get_indexer(mine), self._names.get_indexer(theirs)
        known = (a >= 0) & (b >= 0)
        if not known.any():
            return np.ones(len(end), dtype=bool)
        common = np.minimum(np.minimum(end, self.length[a]), self.length[b])
        with np.errstate(over="ignore"):
            sums = [self._sum[self._offset[x] + common] - self._sum[self._offset[x]] for x in (a, b)]
        return np.asarray(~known | (sums[0] == sums[1]))


def _flat(column: pa.ChunkedArray) -> tuple[Array, Array]:
    """Values of a list column end to end, and the length of each list."""
    lengths = _flat_lengths(column)
    pieces = [c.flatten().to_numpy(zero_copy_only=False) for c in column.chunks]
    return (np.concatenate(pieces) if pieces else np.empty(0, np.int64)), lengths


def _flat_lengths(column: pa.ChunkedArray) -> Array:
    import pyarrow.compute as pc

    if not len(column):
        return np.empty(0, np.int64)
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)


def _place(out: Array, to: Array, values: Array, counts: Array) -> None:
    """Copy consecutive runs of `values`, of these lengths, to these places of `out`."""
    begin = np.cumsum(counts) - counts
    out[np.repeat(to - begin, counts) + np.arange(int(counts.sum()))] = values
