"""In which order an SAE is trained on rows.

It follows from the rows and the seed alone. The order of each phase is drawn by itself and the phases are then
interleaved by a fixed pattern, so that trainings with different shares of decode rows see the same prefill rows in the
same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sglang_probe.errors import ConfigError
from sglang_probe.sae.harvested import Harvested, Listed

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Schedule:
    """The endless order in which rows are trained on: batch s is rows `[s * size, (s + 1) * size)` of one epoch after
    another, so that any batch can be made without those before it."""

    phases: Sequence[Array]
    """Places of the rows of each phase."""
    shares: Sequence[float]
    """Of each phase in an epoch; they sum to 1."""
    seed: int
    together: int | None = None
    """Rows that are shuffled together; None: all. An epoch is then several fills of a buffer, each of random pieces of
    the rows (a 256th of it long, so that they are read in one go), with each phase at its share, in random order."""
    _epochs: dict[int, Array] = field(default_factory=dict, repr=False, compare=False)

    @property
    def epoch_length(self) -> int:
        """Rows of one epoch: as many as the scarcest phase allows at its share."""
        return sum(self._counts())

    @property
    def ends(self) -> list[int]:
        """Where in an epoch each fill ends."""
        fills = self._fills()
        return [sum(n * (i + 1) // fills for n in self._counts()) for i in range(fills)]

    def batch(self, step: int, size: int) -> Array:
        """Places of the rows of a batch, int64 `[size]`."""
        return np.concatenate([self.epoch(e)[start:end] for e, start, end in self.spans(step, size)])

    def spans(self, step: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Of which epochs a batch is, and where in each: number, start and end."""
        at, end, length = step * size, (step + 1) * size, self.epoch_length
        while at < end:
            epoch, inside = divmod(at, length)
            n = min(length - inside, end - at)
            yield epoch, inside, inside + n
            at += n

    def epoch(self, number: int) -> Array:
        """Places of the rows of one epoch, in their order."""
        if number not in self._epochs:
            self._epochs.clear()
            self._epochs[number] = self._whole(number) if self._fills() == 1 else self._in_fills(number)
        return self._epochs[number]

    def _counts(self) -> list[int]:
        most = min(len(p) / s for p, s in zip(self.phases, self.shares, strict=True) if s > 0)
        return [int(most * s + 1e-9) for s in self.shares]

    def _fills(self) -> int:
        if self.together is None or sum(map(len, self.phases)) <= self.together:
            return 1
        return -(-self.epoch_length // max(1, self.together - len(self.phases) + 1))

    def _whole(self, number: int) -> Array:
        rows = []
        for phase, (places, n) in enumerate(zip(self.phases, self._counts(), strict=True)):
            # The same generator whatever the shares: arms of a mixture see one order of each phase.
            rows.append(np.random.default_rng([self.seed, number, phase]).permutation(places)[:n])
        return _interleaved(rows)

    def _in_fills(self, number: int) -> Array:
        fills, found = self._fills(), []
        piece = max(1, (self.together or 0) // 256)
        rngs = [np.random.default_rng([self.seed, number, phase]) for phase in range(len(self.phases))]
        rows = [
            np.concatenate([p[i * piece : (i + 1) * piece] for i in rng.permutation(-(-len(p) // piece))] or [p])[:n]
            for rng, p, n in zip(rngs, self.phases, self._counts(), strict=True)
        ]
        for i in range(fills):
            parts = [r[len(r) * i // fills : len(r) * (i + 1) // fills] for r in rows]
            found.append(_interleaved([rng.permutation(part) for rng, part in zip(rngs, parts, strict=True)]))
        return np.concatenate(found)


def _interleaved(rows: Sequence[Array]) -> Array:
    """Rows of each phase in their order, spread evenly over one sequence."""
    where = [(np.arange(len(r)) + 0.5) / max(len(r), 1) for r in rows]
    return np.concatenate(rows)[np.argsort(np.concatenate(where), kind="stable")]


def schedule(
    rows: Harvested | Listed, mix: Mapping[str, float] | None, seed: int, together: int | None = None
) -> Schedule:
    """The order of training.

    Args:
        mix: share of each phase; default: as they are.
        together: rows that are shuffled together; default: all.

    Raises:
        ConfigError: a phase of the mix has no rows, or the shares do not sum to 1.
    """
    if mix is None:
        return Schedule([np.arange(len(rows))], [1.0], seed, together)
    if any(s < 0 for s in mix.values()) or abs(sum(mix.values()) - 1) > 1e-6:
        raise ConfigError(f"the shares of `mix` sum to {sum(mix.values()):g}, not to 1")
    there = rows.tokens["phase"].to_numpy()
    places = [np.flatnonzero(there == phase) for phase in mix]
    if empty := [p for p, at in zip(mix, places, strict=True) if not len(at) and mix[p] > 0]:
        raise ConfigError(f"`mix: {empty[0]}`: there are no rows of that phase", fix=f"there are {set(there)}")
    return Schedule(places, list(mix.values()), seed, together)
