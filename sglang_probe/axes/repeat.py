"""Axis `repeat`: whether the workload said this before.

A position is `repeat` if the eight tokens that end in it occurred in the same order earlier in the workload: in an
earlier request, or earlier in this one. The first seven of a request are `start`. The memory is 8 bytes for every
different sequence of eight tokens. Sequences are compared by a 64-bit hash (`sglang_probe.hashing`).
"""

from __future__ import annotations

import numpy as np

from sglang_probe.axes.axis import UNKNOWN, Axis
from sglang_probe.axes.batch import Array, Batch
from sglang_probe.hashing import GOLDEN, Hashes, mix64

N = 8


class Repeat(Axis):
    """`new`, `repeat`, or `start`."""

    needs_ids = True

    def __init__(self) -> None:
        super().__init__("repeat", ["new", "repeat", "start", UNKNOWN])
        self._seen = _HashSet()

    def begin(self) -> None:
        """Forget what an earlier pass saw."""
        self._seen = _HashSet()

    def labels(self, batch: Batch) -> Array:
        """See `Axis`."""
        codes = np.full(len(batch), 2, dtype=np.uint16)
        inside = batch.position - batch.each(batch.begin)
        whole = np.flatnonzero(inside >= N - 1)
        hashes = ngram_hashes(batch.ids)[whole - (N - 1)] if len(whole) else np.empty(0, dtype=np.uint64)
        codes[whole] = self._seen.add(hashes)
        if (batch.ids < 0).any():
            # Eight tokens of which one is unknown are unknown.
            missing = np.cumsum(np.append(0, batch.ids < 0))
            codes[whole[missing[whole + 1] > missing[whole - (N - 1)]]] = 3
            codes[batch.ids < 0] = 3
        return codes


def ngram_hashes(ids: Array) -> Hashes:
    """uint64 [len(ids) - 7]: hash of each eight consecutive tokens."""
    words = mix64(ids.astype(np.uint64) + GOLDEN)
    count = len(ids) - (N - 1)
    total = np.zeros(max(count, 0), dtype=np.uint64)
    for i in range(N if count > 0 else 0):
        total = total * GOLDEN + words[i : i + count]
    return mix64(total)


class _HashSet:
    """Sorted arrays of doubling size, so that adding n hashes costs n log n in all and the memory is that of a set."""

    def __init__(self) -> None:
        self._levels: list[Hashes] = []

    def add(self, hashes: Hashes) -> Array:
        """bool: which of the hashes were there, or earlier in `hashes` itself. All are there from now on."""
        known = np.ones(len(hashes), dtype=bool)
        unique, first = np.unique(hashes, return_index=True)
        old = np.zeros(len(unique), dtype=bool)
        for level in self._levels:
            at = np.searchsorted(level, unique)
            old |= level[np.minimum(at, len(level) - 1)] == unique
        known[first] = old
        new = unique[~old]
        while self._levels and len(self._levels[-1]) < 2 * len(new):
            new = np.concatenate([self._levels.pop(), new])
            new.sort(kind="stable")  # two sorted runs: a merge
        if len(new):
            self._levels.append(new)
        return known
