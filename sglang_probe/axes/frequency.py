"""Axis `frequency`: how common a token is in this workload, in bands of rank."""

from __future__ import annotations

import numpy as np

from sglang_probe.axes.axis import UNKNOWN, Axis
from sglang_probe.axes.batch import Array, Batch

_RANKS = (10, 100, 1000, 10000)
_BANDS = ["10 most frequent", "rank 11–100", "rank 101–1,000", "rank 1,001–10,000", "rank from 10,001", "once", UNKNOWN]


class Frequency(Axis):
    """Bands of a token's rank by its occurrences in traffic (prompts and outputs); tokens that occur once apart.

    Ties are broken by token id.
    """

    needs_ids = True
    observes = True

    def __init__(self) -> None:
        super().__init__("frequency", list(_BANDS))
        self._counts = np.zeros(0, dtype=np.int64)
        self._band = np.zeros(0, dtype=np.uint16)

    def observe(self, batch: Batch) -> None:
        """Count tokens; number 0 holds the unknown ones."""
        found = np.bincount(batch.ids + 1, minlength=len(self._counts))
        found[: len(self._counts)] += self._counts
        self._counts = found

    def begin(self) -> None:
        """Turn counts into bands."""
        counts = self._counts[1:]
        rank = np.empty(len(counts), dtype=np.int64)
        rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
        band = np.searchsorted(_RANKS, rank, side="right")
        band[counts == 1] = _BANDS.index("once")
        self._band = np.concatenate([[_BANDS.index(UNKNOWN)], band]).astype(np.uint16)

    def labels(self, batch: Batch) -> Array:
        """See `Axis`."""
        return self._band[batch.ids + 1]
