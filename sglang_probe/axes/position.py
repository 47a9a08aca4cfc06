"""Axes `position` and `depth`: where in the request, and how far into the generation, in bins that double.

The first position has a bin of its own: it is the attention sink of most models, and every request has one.
"""

from __future__ import annotations

import numpy as np

from sglang_probe.axes.axis import UNKNOWN, Axis
from sglang_probe.axes.batch import Array, Batch

_FIRST_EDGE = 16  # below it, bins that double would be too small to tell anything
_EDGES = np.array([0, 1, *(_FIRST_EDGE << i for i in range(18))])
_TABLE = np.searchsorted(_EDGES, np.arange(1 << 17), side="right").astype(np.uint16) - np.uint16(1)

BINS = ["0", *(f"{a:,}–{b - 1:,}" for a, b in zip(_EDGES[1:-1].tolist(), _EDGES[2:].tolist(), strict=True))]
BINS.append(f"{int(_EDGES[-1]):,} on")


def bins_of(values: Array) -> Array:
    """uint16: number of the bin in `BINS` of each non-negative value."""
    if len(values) and int(values.max()) >= len(_TABLE):
        return (np.searchsorted(_EDGES, values, side="right") - 1).astype(np.uint16)
    return _TABLE[values]


class Position(Axis):
    """Position in the request: 0, 1 to 15, 16 to 31, 32 to 63, ..."""

    def __init__(self) -> None:
        super().__init__("position", list(BINS))

    def labels(self, batch: Batch) -> Array:
        """See `Axis`."""
        begin = batch.begin.astype(np.int64)
        end = begin + np.diff(batch.offsets)
        edges = _EDGES[: np.searchsorted(_EDGES, end.max(initial=0)) + 1]
        inside = np.clip(np.append(edges, np.iinfo(np.int64).max)[:, None], begin, end)
        counts = np.diff(inside, axis=0).T
        return np.repeat(np.tile(np.arange(len(edges), dtype=np.uint16), len(begin)), counts.ravel())


class Depth(Axis):
    """Number of the generated token, from 0, in the same bins; `prompt` before it."""

    def __init__(self) -> None:
        super().__init__("depth", ["prompt", *BINS, UNKNOWN])

    def labels(self, batch: Batch) -> Array:
        """See `Axis`."""
        depth = batch.depth
        codes = np.where(depth >= 0, bins_of(np.maximum(depth, 0)) + np.uint16(1), np.uint16(0))
        if (batch.prompt_len < 0).any():
            codes[batch.each(batch.prompt_len < 0)] = len(self.classes) - 1
        return codes.astype(np.uint16, copy=False)
