"""The offline grid piece by piece: a piece is one group of prompts of a task, under every policy, budget and protocol.

Pieces are computed side by side, each is kept as soon as it is finished, and `merge` puts them together. Nothing in the
grid depends on other prompts, but for one control, which takes the queries of another prompt of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.run.run import load_run
from sglang_probe.studies.evict.asked import KeptSets
from sglang_probe.studies.evict.config import EvictionConfig
from sglang_probe.studies.evict.layers import Group, Reader
from sglang_probe.studies.evict.lookahead_runs import AheadRuns
from sglang_probe.studies.evict.needed import Positions
from sglang_probe.studies.evict.offline import CELL, Offline, run_offline, spoiled
from sglang_probe.studies.partials import Partials

KEPT = "kept.safetensors"


@dataclass(frozen=True)
class Piece:
    """One group of prompts of a task."""

    task: str
    number: int
    group: Group

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.task}-{self.number:04d}"


@dataclass
class Grid:
    """Selects and judges a piece and keeps what it finds: `work` of `studies.workers.compute`.

    Attributes:
        full: directory of the full-cache run of each task.
        model: model folder.
        needed: positions that answers need, where they were looked for.
    """

    config: EvictionConfig
    layers: Sequence[int]
    full: dict[str, Path]
    model: str
    ahead: dict[str, AheadRuns]
    needed: dict[str, Positions | None]
    partials: Partials
    _readers: dict[str, Reader] = field(default_factory=dict, repr=False)

    def steps(self, pieces: int) -> int:
        """How often `advance` is called for so many pieces."""
        return pieces * len(self.config.protocols) * (len(self.config.entries) + len(spoiled(self.config.controls)))

    def reader(self, task: str) -> Reader:
        """Reads groups of a task."""
        if task not in self._readers:
            run = load_run(self.full[task])
            self._readers[task] = Reader(run, self.layers, model=self.model, needed=self.needed[task])
        return self._readers[task]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

    def __call__(self, piece: Piece, advance: Callable[[], None]) -> None:
        """Raises: ProbeError: a policy keeps another number of positions than its budget says."""
        config, task, out, kept = self.config, piece.task, Offline(), KeptSets()
        batch = self.reader(task).read(piece.group)
        run_offline(
            task,
            [batch],
            config.entries,
            config.budgets,
            config.protocols,
            config.trivial,
            controls_of=config.controls,
            ahead=self.ahead[task].read(batch.rids, self.layers),
            out=out,
            keep=kept.add if config.in_engine else None,
            advance=advance,
        )
        if config.in_engine:
            for protocol in config.protocols:
                kept.add_everything(task, protocol, batch)
        rows, heads, excluded = out.frames()
        tables = {"offline": rows, "heads": heads, "excluded": excluded, "cells": kept.cells}
        tables["counts"] = pd.DataFrame({"asserted": [out.asserted]})
        self.partials.write(piece.name, tables, partial(_write_kept, kept) if config.in_engine else None)


def _write_kept(kept: KeptSets, folder: Path) -> None:
    kept.write(folder / KEPT)


def merge(parts: Iterable[dict[str, pd.DataFrame]]) -> dict[str, pd.DataFrame]:
    """The tables of a study from those of its pieces: rows one after the other, sums of heads and counts added up."""
    parts = list(parts)
    found = {name: _concat([p[name] for p in parts]) for name in ("offline", "heads", "excluded", "counts")}
    if len(found["heads"]):
        found["heads"] = found["heads"].groupby([*CELL, "layer", "head"], sort=False, as_index=False).sum()
    if len(found["excluded"]):
        found["excluded"] = found["excluded"].groupby([*CELL, "reason"], sort=False, as_index=False).sum()
    return found


def _concat(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Without empty ones, whose columns have no dtype."""
    return pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)
