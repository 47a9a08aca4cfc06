"""A run as flat numpy arrays, for studies of whole ledgers.

`Run`'s frames hold a Python object for every string and list; at a hundred million positions that is neither fast nor
small. Here requests and spans are integer columns that stay in memory (they are few), and token ids are read in
workload order, a batch of requests at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sglang_probe.errors import LedgerError, RunDirectoryError
from sglang_probe.run import schema
from sglang_probe.run.damage import read_table, reading, require_columns
from sglang_probe.run.files import REQUESTS_FILE, RunFiles

Array = np.ndarray[Any, Any]

FATES = (schema.COMPUTED, schema.REUSED, schema.DROPPED, schema.UNREQUESTED)
PHASES = (schema.PREFILL, schema.DECODE, schema.RECOMPUTE, schema.OVERSHOOT)
NO_PHASE = len(PHASES)
_SPAN_COLUMNS = ["rid", "attempt", "start", "end", "status", "phase", "origin_rid", "origin_attempt"]


@dataclass(frozen=True)
class Intervals:
    """Named positions of requests: `[start[i], end[i])` of request `request[i]` are of class `names[code[i]]`.

    Sorted by request and start.
    """

    names: tuple[str, ...]
    request: Array
    start: Array
    end: Array
    code: Array


@dataclass(frozen=True)
class Requests:
    """The served requests, in workload order; R of them."""

    rid: pa.StringArray
    file_row: Array
    """Row in `requests.parquet`."""
    prompt_len: Array
    """-1 where a segment of a live recording does not know it."""
    family: Array
    """Number of the prefix family, -1: none was named."""
    segments: Intervals
    labels: Mapping[str, Intervals]
    """Axes that the workload labelled itself, by character spans."""

    def __len__(self) -> int:
        return len(self.rid)


@dataclass(frozen=True)
class Spans:
    """Spans as integers. Requests that were not served (warm-up, interrupted) are numbered from R on."""

    request: Array
    attempt: Array
    start: Array
    end: Array
    fate: Array
    """Number in `FATES`."""
    phase: Array
    """Number in `PHASES`, or `NO_PHASE`."""
    origin: Array
    """Request that computed a reused span; -1: none, or before the recording."""
    origin_attempt: Array

    def __len__(self) -> int:
        return len(self.request)

    def where(self, chosen: Array) -> Spans:
        """The chosen ones: a mask or indices."""
        return Spans(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))


def read_requests(run: RunFiles) -> Requests:
    """The columns of `requests.parquet` that are small; those of requests in flight at a crash are left out."""
    path = run.path / REQUESTS_FILE
    if not path.exists():
        raise RunDirectoryError(f"{path} is missing: nothing can be said of requests", fix="finish the run first")
    names = ["rid", "prompt_len", "finish_reason", "family", "segments", "labels"]
    with reading(path):
        file = pq.ParquetFile(path)
        present = set(file.schema_arrow.names)
        require_columns(path, file.schema_arrow, names[:5])
        table = file.read(columns=[n for n in names if n in present])
    served = np.flatnonzero(pc.not_equal(table["finish_reason"], schema.INTERRUPTED).to_numpy())
    table = table.take(pa.array(served))
    family = pc.index_in(table["family"], value_set=pc.drop_null(pc.unique(table["family"])))
    axes: dict[str, Intervals] = {}
    if "labels" in present:
        axis, everything = _structs(table["labels"], "axis"), _structs(table["labels"], "name")
        for code, name in enumerate(axis.names):
            request, start, end, number = (getattr(everything, f)[axis.code == code] for f in _FIELDS)
            used, number = np.unique(number, return_inverse=True)
            axes[name] = Intervals(tuple(everything.names[i] for i in used), request, start, end, number)
    return Requests(
        rid=table["rid"].combine_chunks(),
        file_row=served,
        prompt_len=_ints(table["prompt_len"], np.int32),
        family=_ints(family, np.int32),
        segments=_structs(table["segments"], "name"),
        labels=axes,
    )


def read_spans(run: RunFiles, requests: Requests) -> Spans:
    """All spans of all attempts."""
    files = [run.path / f for part in run.parts() for f in part.files if f.startswith("ledger/spans-")]
    empty = schema.SPANS.empty_table().select(_SPAN_COLUMNS)
    filled = [name for name in _SPAN_COLUMNS if name in schema.NEVER_NULL["spans"]]
    table = pa.concat_tables([empty, *(read_table(f, empty.schema, never_null=filled) for f in files)])
    rids = pc.unique(pa.chunked_array([requests.rid, *table["rid"].chunks], type=pa.string()))
    return Spans(
        request=_ints(pc.index_in(table["rid"], value_set=rids), np.int32),
        attempt=_ints(table["attempt"], np.int32),
        start=_ints(table["start"], np.int32),
        end=_ints(table["end"], np.int32),
        fate=_ints(pc.index_in(table["status"], value_set=pa.array(FATES)), np.uint8),
        phase=_ints(pc.index_in(table["phase"], value_set=pa.array(PHASES)), np.uint8, NO_PHASE),
        origin=_ints(pc.index_in(table["origin_rid"], value_set=rids, skip_nulls=True), np.int32),
        origin_attempt=_ints(table["origin_attempt"], np.int32),
    )


@dataclass(frozen=True)
class Traffic:
    """What was served: spans of the last attempts without discarded steps, sorted, tiling `[begin, end)` of each."""

    spans: Spans
    begin: Array
    """First position of each request, `[R]`: 0, or where a segment of a live recording goes on with it."""
    end: Array

    @property
    def positions(self) -> int:
        return int((self.end - self.begin).sum())


def read_traffic(requests: Requests, spans: Spans) -> Traffic:
    """Choose the last attempt of each served request.

    Raises:
        LedgerError: spans of a request have a gap or overlap.
    """
    count = len(requests)
    mine = spans.request < count
    last = np.zeros(count + 1, dtype=np.int32)
    owner = np.minimum(spans.request, count)
    np.maximum.at(last, owner, spans.attempt)
    mine &= (spans.attempt == last[owner]) & (spans.phase != PHASES.index(schema.OVERSHOOT))
    served = spans.where(mine)
    if (order := _unsorted(served.request, served.start)) is not None:
        served = served.where(order)
    first = np.flatnonzero(np.diff(served.request, prepend=-1))
    follows = np.ones(len(served), dtype=bool)
    follows[first] = False
    broken = follows & (served.start != np.concatenate([[0], served.end[:-1]]))
    if broken.any():
        at = int(np.argmax(broken))
        raise LedgerError(
            f"spans of {requests.rid[int(served.request[at])]} do not tile its positions at {served.start[at]}",
            fix="`sglang-probe verify` names what is wrong with the run",
        )
    begin, end = np.zeros((2, count), dtype=np.int32)
    begin[served.request[first]] = served.start[first]
    end[served.request[first]] = served.end[np.append(first[1:], len(served)) - 1] if len(first) else 0
    return Traffic(served, begin, end)


class TokenIds:
    """Token ids of prompts and outputs, read once from front to back, a batch of requests at a time."""

    def __init__(self, run: RunFiles, requests: Requests, traffic: Traffic, rows: int) -> None:
        # Without `pre_buffer` and with a buffer, a column is decoded page by page and never held as a whole.
        with reading(run.path / REQUESTS_FILE):
            file = pq.ParquetFile(run.path / REQUESTS_FILE, pre_buffer=False, buffer_size=1 << 20)
            require_columns(run.path / REQUESTS_FILE, file.schema_arrow, ["prompt_ids", "output_ids"])
        self._batches = file.iter_batches(batch_size=rows, columns=["prompt_ids", "output_ids"])
        self._table: pa.Table | None = None
        self._first = 0  # row in the file of the table's first row
        self._requests, self._traffic, self._path = requests, traffic, run.path / REQUESTS_FILE

    def take(self, low: int, high: int) -> Array:
        """Ids of the traffic positions of requests `[low, high)`, laid end to end, int32; -1 where they are unknown.

        Ranges must be asked in ascending order.
        """
        begin = self._traffic.begin[low:high].astype(np.int64)
        end = self._traffic.end[low:high].astype(np.int64)
        lengths = end - begin
        starts = np.cumsum(lengths) - lengths
        out = np.full(int(lengths.sum()), -1, dtype=np.int32)
        table = self._rows(self._requests.file_row[low:high])
        prompt, p = _lists(table["prompt_ids"])
        output, o = _lists(table["output_ids"])
        p_len, o_len = np.diff(p), np.diff(o)
        _copy(out, starts, prompt, p[:-1] + begin, np.minimum(end, p_len) - begin)
        # Without prompt ids it is not known where the output begins.
        inside = np.maximum(begin, p_len)
        room = np.where(p_len > 0, np.minimum(end, p_len + o_len) - inside, 0)
        _copy(out, starts + inside - begin, output, o[:-1] + inside - p_len, room)
        return out

    def _rows(self, rows: Array) -> pa.Table:
        pieces = [] if self._table is None else [self._table]
        have = self._first + sum(len(t) for t in pieces)
        while len(rows) and have <= rows[-1]:
            with reading(self._path):
                pieces.append(pa.Table.from_batches([next(self._batches)]))
            have += len(pieces[-1])
        table = pa.concat_tables(pieces).combine_chunks() if pieces else _NO_IDS
        chosen = rows - self._first
        after = int(chosen[-1]) + 1 if len(chosen) else 0
        self._table, first = table.slice(after), self._first
        self._first = first + after
        whole = len(chosen) and int(chosen[-1] - chosen[0]) + 1 == len(chosen)
        return table.slice(int(chosen[0]), len(chosen)) if whole else table.take(pa.array(chosen, type=pa.int64()))


_NO_IDS = schema.REQUESTS.empty_table().select(["prompt_ids", "output_ids"])
_FIELDS = ("request", "start", "end", "code")


def _copy(out: Array, to: Array, source: Array, at: Array, counts: Array) -> None:
    """`out[to[i] : to[i] + counts[i]] = source[at[i] : ...]` for every i; nothing where a count is not positive."""
    counts = np.maximum(counts, 0)
    total = int(counts.sum())
    if not total:
        return
    step = np.arange(total)
    before = np.cumsum(counts) - counts
    out[np.repeat(to - before, counts) + step] = source[np.repeat(at - before, counts) + step]


def _lists(column: pa.ChunkedArray) -> tuple[Array, Array]:
    """Values and offsets `[n + 1]` of a list column; null lists are empty."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of an empty chunked array
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=column.type)
    return array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy().astype(np.int64)


def _structs(column: pa.ChunkedArray, field: str) -> Intervals:
    """A column of lists of named ranges as intervals; `field` holds the name."""
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], type=column.type)
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0]) if len(array) else array.values
    names = pc.unique(values.field(field))
    request = np.repeat(np.arange(len(array), dtype=np.int32), np.diff(offsets))
    start, end = _ints(values.field("start"), np.int32), _ints(values.field("end"), np.int32)
    code = _ints(pc.index_in(values.field(field), value_set=names), np.int32)
    if (order := _unsorted(request, start)) is not None:
        request, start, end, code = (x[order] for x in (request, start, end, code))
    return Intervals(tuple(names.to_pylist()), request, start, end, code)


def _unsorted(request: Array, start: Array) -> Array | None:
    """Places by request and start; None: they are in this order."""
    key = request.astype(np.int64) << 32 | start
    return np.argsort(key, kind="stable") if (key[1:] < key[:-1]).any() else None


def _ints(column: Any, dtype: Any, missing: int = -1) -> Array:
    return np.asarray(pc.fill_null(column, pa.scalar(missing, type=column.type)).to_numpy()).astype(dtype)
