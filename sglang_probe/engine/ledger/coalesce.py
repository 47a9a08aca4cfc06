"""Joining the one-position spans of decode steps into runs.

The scheduler thread emits one span per request and decode step; the writer joins them here, off the hot path and
within one part, so that every part on disk is complete in itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from sglang_probe.run import schema


def coalesce(spans: pa.Table) -> pa.Table:
    """Join consecutive step spans of one attempt while forward ids rise by one and rows by a constant step.

    Steady decoding of an unchanged batch becomes one span. Spans of other phases pass through. Returns rows sorted by
    (first forward, rid) like the input's launch order would be.

    Args:
        spans: table with `schema.SPANS`; step spans have length 1.
    """
    frame = spans.to_pandas()
    step = frame["phase"].isin(schema.STEP_PHASES).to_numpy()
    steps = frame[step].sort_values(["rid", "attempt", "start"], kind="stable")
    if len(steps) < 2:
        return spans
    starts = _run_starts(
        same=_unchanged(steps["rid"])
        & _unchanged(steps["attempt"])
        & _unchanged(steps["phase"])
        & _unchanged(steps["intervention"].fillna("")),
        position=steps["start"].to_numpy(np.int64),
        forward=steps["forward_id"].to_numpy(np.int64),
        row=steps["row_start"].to_numpy(np.int64),
    )
    first = np.nonzero(starts)[0]
    lengths = np.diff(np.append(first, len(steps)))
    runs = steps.iloc[first].copy()
    runs["end"] = runs["start"].to_numpy() + lengths
    rows = steps["row_start"].to_numpy()
    second = np.minimum(first + 1, len(steps) - 1)
    runs["row_step"] = np.where((lengths > 1) & (rows[first] >= 0), rows[second] - rows[first], runs["row_step"])
    out = pa.concat_tables(
        [
            spans.filter(pa.array(~step)),
            pa.Table.from_pandas(runs, schema=schema.SPANS, preserve_index=False),
        ]
    )
    return out.sort_by([("forward_id", "ascending"), ("row_start", "ascending")])


def _unchanged(column: Any) -> np.ndarray[Any, np.dtype[np.bool_]]:
    values = column.to_numpy()
    return np.concatenate([[False], values[1:] == values[:-1]])


def _run_starts(
    *,
    same: np.ndarray[Any, np.dtype[np.bool_]],
    position: np.ndarray[Any, np.dtype[np.int64]],
    forward: np.ndarray[Any, np.dtype[np.int64]],
    row: np.ndarray[Any, np.dtype[np.int64]],
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Where a new run begins, greedily: each run as long as its first row step allows."""
    gap = np.diff(row, prepend=row[:1])
    joins = same & (np.diff(position, prepend=position[:1] - 2) == 1) & (np.diff(forward, prepend=forward[:1] - 2) == 1)
    turns = np.zeros(len(row), dtype=bool)
    turns[1:] = joins[1:] & joins[:-1] & (gap[1:] != gap[:-1])
    # A turn right after a run's start is none: that pair sets the step. In a chain of turns every other one counts.
    index = np.arange(len(row))
    last_still = np.maximum.accumulate(np.where(turns, -1, index))
    return ~joins | (turns & ((index - last_still) % 2 == 1))
