"""Batches from rows that pass by: a buffer is filled, shuffled and used up, and filled again.

The order is that of `harvested.Schedule`, of the rows that are in the buffer. Where all of them fit, the buffer is
filled once, and the batches are those of the same rows read from a run directory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import TYPE_CHECKING

from sglang_probe.errors import ConfigError
from sglang_probe.sae.harvested import Harvested, joined, schedule

if TYPE_CHECKING:
    import torch


class Buffer:
    """Endless rows from a source of parts.

    Args:
        parts: starts the source again, and gives what it has part by part.
        rows: how many are in memory, give or take a part; twice as many while they are put together.
        mix: share of each phase in the buffer.
    """

    def __init__(
        self, parts: Callable[[], Iterator[Harvested]], rows: int, mix: Mapping[str, float] | None, seed: int
    ) -> None:
        self._parts, self._rows, self._mix, self._seed = parts, rows, mix, seed
        self._passed = False
        self.fills = 0
        """How often it was filled."""
        self.epoch_rows = 0
        """Rows of one pass over the source, or of what was read of it so far."""
        self.skipped = 0
        """Fills that gave nothing: all that was left lacked a phase of the mixture."""

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """Batches without end, float32 `[size, D]`.

        Raises:
            ConfigError: the source gave no rows, or the mixture leaves none.
        """
        import torch

        left: torch.Tensor | None = None
        for rows in self._shuffled(size):
            left = rows if left is None else torch.cat([left, rows])
            while len(left) >= size:
                yield left[:size]
                left = left[size:]

    def _shuffled(self, size: int) -> Iterator[torch.Tensor]:
        import torch

        while True:
            source = self._filled()
            while (got := next(source, None)) is not None:
                held, last = got
                try:
                    order = schedule(held, self._mix, self._seed)
                    if order.epoch_length < 1:
                        raise ConfigError(
                            "the shares of `mix` leave no rows", fix="give the scarce phase a smaller share"
                        )
                except ConfigError:
                    if not self.fills:
                        raise
                    self.skipped += 1  # a small remainder: no reason to lose the training
                    self._passed = self._passed or last
                    continue
                if not self._passed:
                    self.epoch_rows += order.epoch_length
                    self._passed = last
                # If this is all there is, nothing needs to be served again.
                for number in count(self.fills) if last and not self.fills else [self.fills]:
                    self.fills += 1
                    places = order.epoch(number)
                    for start in range(0, len(places), size):
                        yield held.x_ND[torch.from_numpy(places[start : start + size])].float()
                del got, held, order  # before the buffer is filled again

    def _filled(self) -> Iterator[tuple[Harvested, bool]]:
        """What the buffer holds each time, and whether the source had no more after it."""
        held: list[Harvested] = []
        for part in self._parts():
            if sum(map(len, held)) >= self._rows:
                full, held = [joined(held)], []
                yield full.pop(), False
            held.append(part)
        if not held:
            raise ConfigError("nothing was recorded that could be trained on")
        full, held = [joined(held)], []
        yield full.pop(), True
