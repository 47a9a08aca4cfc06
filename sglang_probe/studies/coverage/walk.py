"""Walking over a run in batches of requests, with everything that a label or a count needs as flat arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from sglang_probe.axes.batch import SEGMENT, Batch, Painted
from sglang_probe.run import columns
from sglang_probe.run.columns import Intervals
from sglang_probe.run.run import Run

Array = np.ndarray[Any, Any]

BATCH_POSITIONS = 1 << 18
"""Positions a batch: its arrays of 8 bytes fit into a processor's cache together."""


@dataclass(frozen=True)
class Runs:
    """Runs of positions of a batch, end to end, r of them."""

    start: Array
    """int64 [r]: first position in the batch."""
    length: Array
    """int64 [r]: positions."""
    request: Array
    """int64 [r]: number of the request in the batch."""


@dataclass(frozen=True)
class Step:
    """Requests `[low, high)` of the run, and the batch of their positions."""

    low: int
    high: int
    batch: Batch
    fate: Array
    """uint8 [spans]: number in `columns.FATES` of each of the batch's spans."""

    def each_fate(self) -> Array:
        """uint8 [N]"""
        return np.repeat(self.fate, self.batch.span_length)

    def runs(self, *labels: Array, edges: Array | None = None) -> Runs:
        """Runs of consecutive positions of one request in which all of these labels are constant.

        A few numbers a run are counted many times faster than one a position.

        Args:
            labels: `[N]` each.
            edges: positions in the batch where a run begins besides.
        """
        offsets, count = self.batch.offsets, len(self.batch)
        begins = np.zeros(count, dtype=bool)
        for label in labels:
            begins[1:] |= label[1:] != label[:-1]
        for at in (offsets, *(() if edges is None else (edges,))):
            begins[at[at < count]] = True
        start = np.flatnonzero(begins)
        of_each = np.diff(np.searchsorted(start, offsets))
        return Runs(start, np.diff(start, append=count), np.repeat(np.arange(len(of_each)), of_each))


class Walk:
    """The columns of a run, read once, and its positions, as often as needed."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.requests = columns.read_requests(run)
        self.spans = columns.read_spans(run, self.requests)
        self.traffic = columns.read_traffic(self.requests, self.spans)
        self._intervals: Mapping[str, Intervals] = {SEGMENT: self.requests.segments, **self.requests.labels}

    def steps(self, *, ids: bool) -> Iterator[Step]:
        """Every served request once, in workload order. `ids`: with token ids."""
        return _ahead(self._steps(ids))

    def _steps(self, ids: bool) -> Iterator[Step]:
        traffic = self.traffic
        lengths = (traffic.end - traffic.begin).astype(np.int64)
        total = np.cumsum(lengths)
        edges = np.searchsorted(total, np.arange(BATCH_POSITIONS, self.positions, BATCH_POSITIONS), side="left") + 1
        edges = np.unique(np.concatenate([[0], edges, [len(lengths)]]))
        rows = max(1, min(4096, BATCH_POSITIONS // max(1, self.positions // max(1, len(lengths)))))
        tokens = columns.TokenIds(self.run, self.requests, traffic, rows) if ids else None
        spans = traffic.spans
        span_edges = np.searchsorted(spans.request, edges)
        for (low, high), (a, b) in zip(pairwise(edges.tolist()), pairwise(span_edges.tolist()), strict=True):
            offsets = np.concatenate([[0], np.cumsum(lengths[low:high])])
            batch = Batch(
                offsets=offsets,
                begin=traffic.begin[low:high],
                prompt_len=self.requests.prompt_len[low:high],
                span_length=(spans.end[a:b] - spans.start[a:b]).astype(np.int64),
                span_phase=spans.phase[a:b],
                token_id=tokens.take(low, high) if tokens else None,
                painted={name: self._paint(i, low, high, offsets) for name, i in self._intervals.items()},
            )
            yield Step(low, high, batch, spans.fate[a:b])

    @property
    def positions(self) -> int:
        """Positions of the traffic."""
        return self.traffic.positions

    def _paint(self, intervals: Intervals, low: int, high: int, offsets: Array) -> Painted:
        # Of the column's own type: numpy would make another column of all of it for each batch.
        a, b = np.searchsorted(intervals.request, np.array([low, high], dtype=intervals.request.dtype))
        local = intervals.request[a:b] - low
        begin, end = self.traffic.begin[low:high][local], self.traffic.end[low:high][local]
        start = np.clip(intervals.start[a:b], begin, end) - begin + offsets[local]
        stop = np.clip(intervals.end[a:b], begin, end) - begin + offsets[local]
        return Painted(start, stop, intervals.code[a:b])


def _ahead(items: Iterator[Step]) -> Iterator[Step]:
    """The same, each made by a thread while the one before it is used: reading and counting share two processors,
    because Arrow and NumPy let go of Python's lock."""
    with ThreadPoolExecutor(1, "sglang-probe-walk") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
