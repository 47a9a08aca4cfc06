"""A part that is being filled: the facts and rows of commits, until they are written as files (see `journal`)."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from sglang_probe.engine.capture.telemetry import Measured
from sglang_probe.engine.ledger.coalesce import coalesce
from sglang_probe.engine.ledger.facts import Commit, Decision, Under
from sglang_probe.run import journal, schema
from sglang_probe.run.shards import INDEX_KEY, ROWS_KEY

TELEMETRY_FOLDER = "telemetry"

_SHARD_BYTES = 64 << 20
_PART_FACTS = 200_000


class OpenPart:
    """Commits, in order. Written once; after an error it can be written again."""

    def __init__(self) -> None:
        self._forwards: list[tuple[Any, ...]] = []
        self._spans: list[tuple[Any, ...]] = []
        self._rebinds: list[tuple[Any, ...]] = []
        self._tree: list[tuple[Any, ...]] = []
        self._requests: list[tuple[Any, ...]] = []
        self._prompts: list[tuple[Any, ...]] = []
        self._prompt_bytes = 0
        self._interventions: dict[str, Under] = {}
        self._gates: dict[str, Decision] = {}
        self._budget: list[tuple[Any, ...]] = []
        self._monitored: list[tuple[Any, ...]] = []
        self._rows: dict[str, list[torch.Tensor]] = {}
        self._bytes: dict[str, int] = {}
        self._index: dict[str, list[np.ndarray]] = {}
        self._telemetry: list[Measured] = []
        self.numbered = 0
        """Rows that were given numbers in this part, selected or not."""

    @property
    def empty(self) -> bool:
        return not (self._forwards or self._spans or self._requests)

    @property
    def full(self) -> bool:
        """Whether it is large enough to be written before its time."""
        facts = len(self._spans) + len(self._forwards)
        return facts >= _PART_FACTS or max([self._prompt_bytes, *self._bytes.values()]) >= _SHARD_BYTES

    @property
    def forwards_end(self) -> int | None:
        """One past the last forward pass; None if there is none."""
        return self._forwards[-1][0] + 1 if self._forwards else None

    def take(self, commit: Commit) -> None:
        """Add a commit."""
        if commit.forward is not None:
            self._forwards.append(commit.forward)
        self._spans += commit.spans
        self._rebinds += commit.rebinds
        self._tree += commit.tree
        self._requests += commit.requests
        for prompt in commit.prompts:  # may take a while: here, and not where it ended
            self._prompts.append(prompt.told())
            self._prompt_bytes += prompt.nbytes
        self._interventions |= commit.interventions
        self._gates |= commit.gates
        self._budget += commit.budget
        self._monitored += commit.monitored
        for hook_point, rows in (commit.rows or {}).items():
            self._rows.setdefault(hook_point, []).append(rows)
            self._bytes[hook_point] = self._bytes.get(hook_point, 0) + rows.nbytes
            if (selected := commit.selected.get(hook_point)) is not None:
                self._index.setdefault(hook_point, []).append(selected + self.numbered)
        self.numbered += commit.numbered
        if commit.telemetry is not None:
            self._telemetry.append(commit.telemetry)

    def write(self, run: Path, stem: str, *, row_start: int) -> dict[str, str]:
        """Write the files of the part, durably.

        Args:
            stem: how their names end.
            row_start: number of the first row.

        Returns the SHA-256 of each file by its path relative to `run`.

        Raises:
            OSError: the disk does not take them; none is left, so that what is needed to say so finds room.
        """
        files: dict[str, str] = {}
        try:
            for hook_point, pieces in self._rows.items():
                name = f"rows/{hook_point}/shard-{stem}.safetensors"
                files[name] = _save_rows(run / name, torch.cat(pieces), self._index.get(hook_point), row_start)
            for table, table_schema, facts in (
                ("spans", schema.SPANS, self._spans),
                ("forwards", schema.FORWARDS, self._forwards),
                ("rebinds", schema.REBINDS, self._rebinds),
                ("tree", schema.TREE, self._tree),
                ("requests", schema.ENGINE_REQUESTS, self._requests),
                ("prompts", schema.PROMPTS, self._prompts),
                ("interventions", schema.INTERVENTIONS, _interventions(self._interventions)),
                ("budget", schema.BUDGET, self._budget),
                ("monitored", schema.MONITORED, self._monitored),
                ("gates", schema.GATES, [(rid, *astuple(d)) for rid, d in self._gates.items()]),
            ):
                if facts:
                    name = f"ledger/{table}-{stem}.parquet"
                    table_of_facts = _table(table_schema, facts)
                    if table == "spans":
                        table_of_facts = coalesce(table_of_facts)
                    files[name] = _save_table(run / name, table_of_facts)
            if self._telemetry:
                name = f"{TELEMETRY_FOLDER}/part-{stem}.parquet"
                files[name] = _save_table(run / name, _telemetry_table(self._telemetry))
        except BaseException:
            for name in files:
                with suppress(OSError):
                    (run / name).unlink()
            raise
        return files


def size_of(commit: Commit) -> int:
    """Bytes of its tensors and prompts."""
    measured = 0 if commit.telemetry is None else commit.telemetry.nbytes
    measured += sum(prompt.nbytes for prompt in commit.prompts)
    if commit.watched is not None:
        measured += commit.watched.x_ND.nbytes
    return measured + sum(rows.nbytes for rows in (commit.rows or {}).values())


def _save_rows(path: Path, rows: torch.Tensor, index: list[np.ndarray] | None, row_start: int) -> str:
    tensors = {ROWS_KEY: rows}
    if index is not None:
        tensors[INDEX_KEY] = torch.from_numpy(np.concatenate(index))
    try:
        return journal.write_durably(path, lambda p: save_file(tensors, p, metadata={"row_start": str(row_start)}))
    except SafetensorError as e:  # tells the system's error in words alone
        if found := re.search(r"\(os error (\d+)\)", str(e)):
            raise OSError(int(found[1]), str(e), str(path)) from e
        raise


def _interventions(under: dict[str, Under]) -> list[tuple[Any, ...]]:
    return [(rid, u.id, u.prompt_len, u.onset, u.spec) for rid, u in under.items()]


def _save_table(path: Path, table: pa.Table) -> str:
    return journal.write_durably(path, lambda p: pq.write_table(table, p, compression="zstd"))


def _table(table_schema: pa.Schema, facts: list[tuple[Any, ...]]) -> pa.Table:
    arrays = [pa.array(column, type=f.type) for column, f in zip(zip(*facts, strict=True), table_schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=table_schema)


def _telemetry_table(measured: list[Measured]) -> pa.Table:
    """`schema.TELEMETRY` of several forwards: one row per layer and step, layer by layer within a forward."""
    columns: dict[str, Any] = {
        "rid": [rid for m in measured for rid in m.rids * len(m.layers)],
        "attempt": np.concatenate([np.tile(m.attempts, len(m.layers)) for m in measured]),
        "position": np.concatenate([np.tile(m.positions, len(m.layers)) for m in measured]),
        "forward_id": np.repeat([m.forward_id for m in measured], [len(m.rids) * len(m.layers) for m in measured]),
        "layer": np.concatenate([np.repeat(m.layers, len(m.rids)) for m in measured]),
    }
    lists = {name: [m.numbers[name] for m in measured] for name in measured[0].numbers}
    lists |= {name: [getattr(m, name) for m in measured] for name in ("top_positions", "top_weights")}
    for name, pieces in lists.items():
        flat = np.concatenate([x.reshape(x.shape[0] * x.shape[1], int(np.prod(x.shape[2:]))) for x in pieces])
        offsets = np.arange(len(flat) + 1, dtype=np.int32) * flat.shape[1]
        columns[name] = pa.ListArray.from_arrays(offsets, flat.ravel())
    fields = schema.TELEMETRY
    arrays = [c if isinstance(c := columns[f.name], pa.Array) else pa.array(c, type=f.type) for f in fields]
    return pa.Table.from_arrays([a.cast(f.type) for a, f in zip(arrays, fields, strict=True)], schema=fields)
