"""From spans to positions, and from a reused position to the row of its origin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.run import schema

Array = np.ndarray[Any, Any]


def expand(spans: pd.DataFrame) -> pd.DataFrame:
    """One row per position of the given spans: rid, attempt, position, status, phase, forward_id, row, origin_rid,
    origin_attempt; ordered by rid and position."""
    spans = spans.sort_values(["rid", "start"], kind="stable")
    lengths = (spans["end"] - spans["start"]).to_numpy()
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)

    def each(column: str) -> Array:
        return np.repeat(spans[column].to_numpy(), lengths)

    steps = np.isin(each("phase").astype(object), schema.STEP_PHASES)
    row_start = each("row_start")
    return pd.DataFrame(
        {
            "rid": each("rid"),
            "attempt": each("attempt"),
            "position": each("start") + inside,
            "status": each("status"),
            "phase": each("phase"),
            "forward_id": each("forward_id") + steps * inside,
            "row": np.where(row_start >= 0, row_start + each("row_step") * inside, -1),
            "origin_rid": each("origin_rid"),
            "origin_attempt": each("origin_attempt"),
        }
    )


def sources(tokens: pd.DataFrame, spans: pd.DataFrame) -> tuple[Array, Array]:
    """Where the activation of each position is: its own row, or that of the position it was reused from, -1 if none was
    captured; and whether its forward pass is in this run at all."""
    rows = tokens["row"].to_numpy().copy()
    covered = (tokens["status"] == schema.COMPUTED).to_numpy().copy()
    reused = ((tokens["status"] == schema.REUSED) & tokens["origin_rid"].notna()).to_numpy()
    if reused.any():
        asked = tokens[reused]
        at = find_computed(
            spans, asked["origin_rid"], asked["origin_attempt"].to_numpy(np.int64), asked["position"].to_numpy()
        )
        hit = at >= 0
        span = spans.iloc[np.where(hit, at, 0)]
        row_start = span["row_start"].to_numpy()
        offset = asked["position"].to_numpy() - span["start"].to_numpy()
        found = np.where(hit & (row_start >= 0), row_start + offset * span["row_step"].to_numpy(), -1)
        rows[reused] = found
        covered[reused] = hit
    return rows, covered


def find_computed(spans: pd.DataFrame, rid: pd.Series, attempt: Array, position: Array) -> Array:
    """Index (by place in `spans`) of the computed span that holds each asked position; -1 where none does.

    Within one attempt every position is computed at most once, so there is at most one.
    """
    place = np.flatnonzero((spans["status"] == schema.COMPUTED).to_numpy())
    computed = spans.iloc[place]
    names = pd.Index(computed["rid"].unique())
    key = _key(names.get_indexer(computed["rid"]), computed["attempt"].to_numpy(), computed["start"].to_numpy())
    order = np.argsort(key, kind="stable")
    code = names.get_indexer(rid)
    asked = _key(code, attempt, position)
    at = np.searchsorted(key[order], asked, side="right") - 1
    valid = (at >= 0) & (code >= 0)
    candidate = order[np.where(valid, at, 0)]
    owner = key[candidate] >> 32
    valid &= (owner == asked >> 32) & (position < computed["end"].to_numpy()[candidate])
    return np.where(valid, place[candidate], -1)


def _key(code: Array, attempt: Array, position: Array) -> Array:
    return (code.astype(np.int64) << 12 | attempt.astype(np.int64)) << 32 | position.astype(np.int64)
