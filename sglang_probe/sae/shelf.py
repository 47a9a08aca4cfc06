"""Rows of a schedule as they come up: no more of them are in memory than are shuffled together."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_probe.sae.harvested import Listed
from sglang_probe.sae.schedule import Schedule

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]


class Shelf:
    """Batches by their number. Where all rows are shuffled together they are read once; else those of one fill of an
    epoch are in memory, and 8 bytes of each row's place beside them."""

    def __init__(self, rows: Listed, order: Schedule) -> None:
        self._rows, self._order = rows, order
        self._whole = order.together is None or len(rows) <= order.together
        self._held: tuple[int, int] | None = None
        self._x_ND: torch.Tensor | None = None
        self._at: Array | None = None
        self.reads = 0
        """How often it was filled."""

    def batch(self, step: int, size: int) -> torch.Tensor:
        """Rows of a step, float32 `[size, D]`: those of `Schedule.batch`."""
        import torch

        parts = [
            self._part(epoch, at, stop)
            for epoch, start, end in self._order.spans(step, size)
            for at, stop in self._within(start, end)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _within(self, start: int, end: int) -> list[tuple[int, int]]:
        """The span, cut where fills end."""
        cuts = [start, *(e for e in self._order.ends if start < e < end), end]
        return list(pairwise(cuts))

    def _part(self, epoch: int, start: int, end: int) -> torch.Tensor:
        import torch

        places = self._order.epoch(epoch)
        if self._whole:
            if self._x_ND is None:
                self._x_ND, self.reads = self._rows.read(), 1
            return self._x_ND[torch.from_numpy(places[start:end])].float()
        ends = self._order.ends
        fill = bisect_right(ends, start)
        first = ends[fill - 1] if fill else 0
        if self._held != (epoch, fill):
            self._held = self._x_ND = self._at = None  # before the next ones are read
            wanted = places[first : ends[fill]]
            order = np.argsort(wanted, kind="stable")
            self._x_ND = self._rows.read(wanted[order])  # in the order of the files
            self._at = np.empty_like(order)
            self._at[order] = np.arange(len(order))
            self._held, self.reads = (epoch, fill), self.reads + 1
        assert self._x_ND is not None
        assert self._at is not None
        return self._x_ND[torch.from_numpy(self._at[start - first : end - first])].float()
