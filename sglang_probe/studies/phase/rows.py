"""Rows of the same positions from several runs, as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ProbeError
from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.run.tokens import iter_positions

Array = np.ndarray[Any, Any]
_PART = 1 << 18
"""Positions that are looked up at a time: those that are compared are few of them."""


def row_indices(run: Run, start: int, end: int) -> tuple[Array, Array]:
    """Where the rows of positions `[start, end)` of every request are.

    Returns:
        Request indices `[texts]`, ascending, and rows in the row store `[texts, end - start]`.

    Raises:
        ProbeError: a position has no row of its own.
    """
    requests = run.requests()
    parts = [requests.iloc[:0].assign(position=0, row=0)]  # so that a run without requests has columns too
    for _, some in iter_positions(run, requests, _PART):
        here = (some["position"] >= start) & (some["position"] < end) & (some["phase"] != schema.OVERSHOOT)
        parts.append(some.loc[here, ["rid", "position", "row"]])
    tokens = pd.concat([p[["rid", "position", "row"]] for p in parts], ignore_index=True)
    tokens = tokens.assign(index=tokens["rid"].map(requests.set_index("rid")["index"]))
    tokens = tokens.sort_values(["index", "position"])
    texts = np.sort(tokens["index"].unique())
    if len(tokens) != len(texts) * (end - start) or (tokens["row"] < 0).any():
        raise ProbeError(f"{run.path} has not computed every position from {start} to {end} itself")
    return texts, tokens["row"].to_numpy().reshape(len(texts), end - start)


def read_rows(run: Run, hook_point: str, where_TC: Array) -> Array:
    """Rows `[texts, positions, width]` in float32."""
    flat = run.rows(hook_point, where_TC.ravel()).float().numpy()
    return flat.reshape(*where_TC.shape, -1)
