"""The requests of the in-engine half: which kept set each names, and the cell of the grid that it answers for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from sglang_probe.errors import ProbeError
from sglang_probe.eviction.protocol import Protocol
from sglang_probe.kept_set import Kept, KeptFile, write_kept
from sglang_probe.studies.evict.grid import Entry
from sglang_probe.studies.evict.layers import Batch

FULL_CACHE, ALL_KEPT = "full cache", "all kept"
"""Labels of the row without a kept set, and of the sanity row whose kept set holds everything."""


class KeptSets:
    """Collects the kept sets of a task while the offline grid runs."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}
        self._cells: list[dict[str, object]] = []

    def add(self, task: str, protocol: Protocol, entry: Entry, budget: str, batch: Batch, keep_BYGL: Tensor) -> None:
        """Take in an eviction's kept sets (`offline.Keep`)."""
        self._add(task, protocol, entry.kind, entry.label, budget, batch, keep_BYGL)

    def add_everything(self, task: str, protocol: Protocol, batch: Batch) -> None:
        """The kept sets of the sanity row."""
        length = batch.context if protocol is Protocol.QUERY_HIDDEN else batch.layer.length
        b, y, _, g, _ = batch.layer.k_LGD.shape
        everything = torch.ones(b, y, g, length, dtype=torch.bool)
        self._add(task, protocol, "full", ALL_KEPT, "1", batch, everything)

    def _add(
        self, task: str, protocol: Protocol, kind: str, policy: str, budget: str, batch: Batch, keep_BYGL: Tensor
    ) -> None:
        for source, keep_YGL in zip(batch.rids, keep_BYGL, strict=True):
            key = f"s{len(self._kept):06d}"
            self._kept[key] = Kept(keep_YGL[None].clone())
            self._cells.append(
                {
                    "task": task,
                    "protocol": protocol.value,
                    "kind": kind,
                    "policy": policy,
                    "budget": budget,
                    "source": source,
                    "key": key,
                    "entries": int(keep_YGL.sum()),
                }
            )

    def extend(self, sets: Path, cells: pd.DataFrame) -> None:
        """Take in what another collector wrote, under new keys."""
        theirs = KeptFile(sets)
        for cell in cells.to_dict("records"):
            key = f"s{len(self._kept):06d}"
            self._kept[key] = theirs[cell["key"]]
            self._cells.append({**cell, "key": key})

    @property
    def cells(self) -> pd.DataFrame:
        """The cell of each set."""
        return pd.DataFrame(self._cells)

    def write(self, sets: Path) -> None:
        """Write the sets (`kept_set.py`)."""
        write_kept(sets, self._kept)


def asked_of(
    cells: pd.DataFrame, sources: Sequence[str], *, task: str, temperature: float, repeats: int, forced: bool
) -> pd.DataFrame:
    """The requests of one way of decoding: the full cache first, so that its entries are there for all others.

    Args:
        cells: as `KeptSets.cells`.
        sources: the workload's requests.

    Returns:
        rid, source, key (None: full cache), entries of its kept set (-1: full cache), the columns of the cell, repeat,
        temperature, forced.
    """
    full = pd.DataFrame({"source": list(sources)})
    full = full.assign(task=task, protocol="", kind="full", policy=FULL_CACHE, budget="1", key=None, entries=-1)
    # The sanity row compares tokens, which sampling would part.
    used = cells if not temperature else cells[cells["policy"] != ALL_KEPT]
    rows = pd.concat([full, used], ignore_index=True)
    out = pd.concat([rows.assign(repeat=i) for i in range(repeats)], ignore_index=True)
    out["rid"] = [f"q{i:07d}" for i in range(len(out))]
    return out.assign(temperature=temperature, forced=forced)


def check_served(asked: pd.DataFrame, outputs: pd.DataFrame) -> int:
    """Assert that every request that was served had the kept set that the grid selected for it, by its counts.

    Args:
        outputs: `run.requests()`: key (`evict`) and counts per head (`kept`) as recorded.

    Returns:
        Requests asserted.

    Raises:
        ProbeError: names the first request that had another set.
    """
    both = asked.merge(outputs[["rid", "evict", "kept"]], on="rid")
    count = 0
    for r in both.itertuples():
        entries = -1 if r.kept is None else int(sum(r.kept))
        key = None if pd.isna(r.key) else r.key
        if entries != r.entries or (key is not None and key != r.evict):
            raise ProbeError(
                f"request {r.rid} ({r.policy}) was served with {entries} kept entries and not {r.entries}",
                fix="run the study again with --overwrite",
            )
        count += key is not None
    return count


def with_full(outcomes: pd.DataFrame, protocols: Sequence[str]) -> pd.DataFrame:
    """The full cache's row under each protocol: nothing distinguishes them."""
    full = outcomes["policy"] == FULL_CACHE
    copies = [outcomes[full].assign(protocol=p) for p in protocols]
    return pd.concat([*copies, outcomes[~full]], ignore_index=True)


def over_repeats(outcomes: pd.DataFrame, metrics: Mapping[str, str]) -> pd.DataFrame:
    """One row per cell and source: means over repeats; `rid` becomes the source."""
    cell = ["task", "protocol", "kind", "policy", "budget", "source"]
    columns = [m for m in metrics if m in outcomes]
    found = outcomes.groupby(cell, sort=False, as_index=False)[columns].mean()
    return found.rename(columns={"source": "rid"})
