"""Batches from rows that pass by: a buffer is filled, shuffled and used up, and filled again.

The order is that of `schedule.Schedule`, of the rows that are in the buffer. Where all of them fit, the buffer is
filled once, and the batches are those of the same rows read from a run directory.

Where a training ends before its time, `Buffer.state` has said which rows the buffer held and how many of them were
used. `Buffer.resume` asks for the parts of that fill again and finds each row by its request and position, so that
none is used twice or passed over, whatever order an engine computed them in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.sae.harvested import Harvested, joined
from sglang_probe.sae.schedule import Schedule, schedule

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
KEY = ["rid", "position"]


@dataclass
class Position:
    """Where in the stream a buffer is; plain data."""

    first: int = 0
    """Number of the first part that is in the buffer, in its pass."""
    next: int = 0
    """Of the first part that is not yet."""
    fills: int = 0
    """How often the buffer was filled."""
    epoch: int = 0
    """Which order of the fill is being used."""
    used: int = 0
    """Rows of that order that were."""
    epoch_rows: int = 0
    """Rows of one pass over the source, or of what was read of it so far."""
    passed: bool = False
    """Whether all of the source was read once."""
    skipped: int = 0
    """Fills that gave nothing: all that was left lacked a phase of the mixture."""
    everything: bool = False
    """Whether the buffer holds all there is, so that nothing needs to be served again."""


class Buffer:
    """Endless rows from a source of parts.

    Args:
        part: the rows of a part, by its number; None: it has none.
        parts: how many there are in a pass.
        rows: how many are in memory, give or take a part; twice as many while they are put together.
        mix: share of each phase in the buffer.
    """

    def __init__(
        self,
        part: Callable[[int], Harvested | None],
        parts: int,
        rows: int,
        mix: Mapping[str, float] | None,
        seed: int,
    ) -> None:
        self._part, self._parts, self._rows, self._mix, self._seed = part, parts, rows, mix, seed
        self._held: Harvested | None = None
        self._order: Schedule | None = None
        self._there: Array | None = None
        """Which rows of a fill that was recorded again are there; None: all."""
        self.at = Position()
        self.lost = 0
        """Rows that were not there any more when they were recorded again, and were still to be used."""

    @property
    def epoch_rows(self) -> int:
        """`Position.epoch_rows`."""
        return self.at.epoch_rows

    @property
    def parts_held(self) -> range:
        """Numbers of the parts that it was filled from."""
        return range(self.at.first, (self.at.next or self._parts) if self.at.fills else 0)

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """Batches without end, float32 `[size, D]`.

        Raises:
            ConfigError: the source gave no rows, or the mixture leaves none.
        """
        while True:
            yield self.batch(size)

    def batch(self, size: int) -> torch.Tensor:
        """The next rows, float32 `[size, D]`; errors as of `batches`."""
        import torch

        parts, n = [], 0
        while n < size:
            held, order = self._ready()
            places = order.epoch(self.at.epoch)[self.at.used : self.at.used + size - n]
            self.at.used += len(places)
            places = places if self._there is None else places[self._there[places]]
            parts.append(held.x_ND[torch.from_numpy(places)].float())
            n += len(places)
            del held, order  # before the buffer is filled again
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def first(self, n: int) -> torch.Tensor:
        """The first rows of the first fill, or all of it, without using them up, float32 `[n, D]`."""
        import torch

        held, order = self._ready()
        return held.x_ND[torch.from_numpy(order.epoch(self.at.epoch)[:n])].float()

    def state(self) -> tuple[dict[str, Any], pd.DataFrame]:
        """Where it is, and the rows that it holds: `rid`, `position`, `phase`, in the order of the parts."""
        keys = pd.DataFrame(columns=[*KEY, "phase"])
        if self._held is not None:
            keys = self._held.tokens[[*KEY, "phase"]]
        return asdict(self.at), keys

    def resume(self, state: Mapping[str, Any], keys: pd.DataFrame) -> None:
        """Go on where `state` was told, with what its parts hold now.

        Raises:
            ConfigError: they hold none of the rows.
        """
        self.at = Position(**state)
        if not len(keys):
            return
        held = self._schedulable(keys)
        order = schedule(held, self._mix, self._seed)
        if self.at.used >= order.epoch_length and not self.at.everything:
            return  # used up: the next fill is another
        found = [p for i in self.parts_held if (p := self._part(i)) is not None]
        again = joined(found) if found else held
        place = _keyed(again.tokens).get_indexer(_keyed(keys))
        there = place >= 0
        if not there.any():
            raise ConfigError("nothing of what the buffer held was recorded again", fix="--overwrite begins anew")
        import torch

        x = torch.zeros((len(keys), again.x_ND.shape[1]), dtype=again.x_ND.dtype)
        x[torch.from_numpy(there)] = again.x_ND[torch.from_numpy(place[there])]
        self._held, self._order = replace(held, x_ND=x), order
        self._there = None if there.all() else there
        left = slice(None) if self.at.everything else slice(self.at.used, None)
        self.lost = int((~there[order.epoch(self.at.epoch)[left]]).sum())

    def _schedulable(self, keys: pd.DataFrame) -> Harvested:
        import torch

        return Harvested(torch.empty((0, 0)), keys.reset_index(drop=True), pd.DataFrame(), float("inf"))

    def _ready(self) -> tuple[Harvested, Schedule]:
        """A fill with rows that were not used yet."""
        if self._held is None or self._order is None:
            self._fill()
        elif self.at.used >= self._order.epoch_length:
            if self.at.everything:
                self.at.epoch, self.at.used = self.at.epoch + 1, 0
            else:
                self._fill()
        assert self._held is not None
        assert self._order is not None
        return self._held, self._order

    def _fill(self) -> None:
        self._held = self._order = self._there = None  # before the next rows are read
        fruitless = 0
        while True:
            first, held = self.at.next, self._read()
            last = self.at.next >= self._parts
            self.at.next = 0 if last else self.at.next
            if held is not None:
                try:
                    order = schedule(held, self._mix, self._seed)
                    if order.epoch_length < 1:
                        raise ConfigError(
                            "the shares of `mix` leave no rows", fix="give the scarce phase a smaller share"
                        )
                except ConfigError:
                    if not self.at.fills:
                        raise
                    self.at.skipped += 1  # a small remainder: no reason to lose the training
                else:
                    break
            self.at.passed = self.at.passed or last
            fruitless += last
            if fruitless > 1 or (last and not self.at.fills):
                raise ConfigError("nothing was recorded that could be trained on")
        if not self.at.passed:
            self.at.epoch_rows += order.epoch_length
            self.at.passed = last
        self.at.everything = last and not self.at.fills
        self.at.first, self.at.epoch, self.at.used = first, self.at.fills, 0
        self.at.fills += 1
        self._held, self._order = held, order

    def _read(self) -> Harvested | None:
        """Parts until the buffer is full, or the pass over."""
        held: list[Harvested] = []
        while self.at.next < self._parts and sum(map(len, held)) < self._rows:
            rows = self._part(self.at.next)
            self.at.next += 1
            if rows is not None and len(rows):
                held.append(rows)
        return joined(held) if held else None


def _keyed(tokens: pd.DataFrame) -> pd.MultiIndex:
    """Request and position of each row, and of rows that come several times (by their weight) which time it is."""
    names = tokens[KEY].astype({"rid": object})
    return pd.MultiIndex.from_frame(names.assign(time=names.groupby(KEY, sort=False).cumcount()))
