"""Counting positions by class, fate and context: one number per run of positions, one bincount per batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_probe.axes.axis import Axis
from sglang_probe.run.columns import FATES
from sglang_probe.studies.coverage.reuse import COMPUTED

Array = np.ndarray[Any, Any]

SEEN, FIRST, NEVER, UNKNOWN = range(4)
"""Contexts: seen earlier in the workload; for the first time; for the first time, and nowhere in the run's
activations; not known, because token ids are not."""

STATES = len(FATES) * 4
"""A position's state is its fate times four plus its context's."""

BINS = 20
"""Of multiplicity: 1, 2, 3 to 4, 5 to 8, ..."""


class Tally:
    """Counts along one axis, or two crossed.

    `counts` is int64 [groups, classes of the first axis, ..., states].
    """

    def __init__(self, axes: Sequence[Axis], groups: int) -> None:
        self.axes = tuple(axes)
        self._groups = groups
        self._shape = tuple(len(a.classes) for a in axes)
        self._counts = np.zeros((groups, *self._shape, STATES), dtype=np.int64)
        self._multiplicity = np.zeros((*self._shape, BINS), dtype=np.int64)

    @property
    def name(self) -> str:
        return " x ".join(a.name for a in self.axes)

    @property
    def counts(self) -> Array:
        return self._counts

    @property
    def multiplicity(self) -> Array:
        """int64 [classes of the first axis, ..., BINS]: computed positions by the occurrences they stand for."""
        return self._multiplicity

    def add(
        self, labels: Sequence[Array], group: Array, state: Array, length: Array, computed: Array, bins: Array
    ) -> None:
        """Count a batch, given as r runs of positions.

        Args:
            labels: class numbers for each axis, `[r]`.
            group: int64 [r].
            state: uint8 [r].
            length: positions of each run, int64 [r].
            computed: indices of computed runs, `[c]`.
            bins: multiplicity bin of each of them, `[c]`.
        """
        self._grow()
        cell = np.zeros(len(length), dtype=np.int64)
        for axis_labels, size in zip(labels, self._shape, strict=True):
            cell *= size
            cell += axis_labels
        size = int(np.prod(self._shape))
        if len(computed):
            found = _sums(cell[computed] * BINS + bins, length[computed], size * BINS)
            self._multiplicity += found.reshape(self._multiplicity.shape)
        cell += group * size
        cell *= STATES
        cell += state
        # Consecutive requests are in few groups: count from the lowest to the highest that occurs.
        low = int(group.min(initial=self._groups)) * size * STATES
        if len(cell):
            found = _sums(cell - low, length)
            self._counts.reshape(-1)[low : low + len(found)] += found

    def _grow(self) -> None:
        """Axes may have found new classes."""
        shape = tuple(len(a.classes) for a in self.axes)
        if shape != self._shape:
            more = [(0, new - old) for new, old in zip(shape, self._shape, strict=True)]
            self._counts = np.pad(self._counts, [(0, 0), *more, (0, 0)])
            self._multiplicity = np.pad(self._multiplicity, [*more, (0, 0)])
            self._shape = shape

    def by_fate(self) -> Array:
        """int64 [classes, ..., fates]"""
        return self._counts.sum(axis=0).reshape(*self._shape, len(FATES), 4).sum(axis=-1)

    def by_context(self) -> Array:
        """int64 [classes, ..., 4]"""
        return self._counts.sum(axis=0).reshape(*self._shape, len(FATES), 4).sum(axis=-2)

    def per_group(self) -> tuple[Array, Array]:
        """Positions and computed positions of each group and class, int64 [groups, cells] each."""
        cells = self._counts.reshape(self._groups, int(np.prod(self._shape)), len(FATES), 4).sum(axis=-1)
        return cells.sum(axis=-1), cells[..., COMPUTED]


def _sums(cell: Array, length: Array, cells: int = 0) -> Array:
    """Positions of each cell, int64: of a batch they are few enough to be exact as floats."""
    return np.bincount(cell, weights=length, minlength=cells).astype(np.int64)
