"""The writer thread: takes commits off the scheduler thread and puts them on disk in parts (see `journal`)."""

from __future__ import annotations

import queue
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from sglang_probe.engine.capture.telemetry import Measured
from sglang_probe.engine.ledger.coalesce import coalesce
from sglang_probe.engine.ledger.recorder import Commit
from sglang_probe.run import journal, schema
from sglang_probe.run.shards import INDEX_KEY, ROWS_KEY

TELEMETRY_FOLDER = "telemetry"

_SHARD_BYTES = 64 << 20
_PART_FACTS = 200_000
_BUNDLE_COMMITS = 64
_BUNDLE_BYTES = 4 << 20


class _Stop(threading.Event):
    """The last thing in the queue."""


class Writer:
    """Sink of the recorder. `put` blocks while too much is waiting: back-pressure, nothing is dropped.

    Goes on after the durable parts of its rank, if the run has any.

    Args:
        run: the run directory.
        session: number of this engine process within the run, 0 for the first.
        dp_rank: data-parallel rank of this process.
        part_seconds: longest time between two parts while commits come.
        max_waiting_bytes: rows that may wait for the disk before `put` blocks.
    """

    def __init__(
        self,
        run: Path,
        *,
        session: int = 0,
        dp_rank: int = 0,
        part_seconds: float = 20.0,
        max_waiting_bytes: int = 1 << 30,
    ) -> None:
        self._run = run
        self.bytes = 0
        """Size of all durable parts."""
        self._part_seconds = part_seconds
        self._session, self._dp_rank = session, dp_rank
        parts = journal.read_rank(run, dp_rank)
        self._part = parts[-1].number + 1 if parts else 0
        self.forwards_end = parts[-1].forwards_end if parts else dp_rank << schema.RANK_SHIFT
        """One past the last durable forward pass."""
        self.rows_end = parts[-1].rows_end if parts else dp_rank << schema.RANK_SHIFT
        """One past the last durable row."""
        self._queue: queue.Queue[list[Commit] | threading.Event] = queue.Queue(maxsize=4096)
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = self._waiting_commits = 0
        self._room = threading.Condition()
        self._handing_over = threading.Lock()
        self._bundle: list[Commit] = []
        self._bundle_bytes = 0
        self._error: BaseException | None = None
        self._clear()
        self._thread = threading.Thread(target=self._work, name="sglang-probe-writer", daemon=True)
        self._thread.start()

    def put(self, commit: Commit) -> None:
        """Hand over a commit.

        Raises:
            OSError: writing failed earlier; the capture must stop.
        """
        self._raise_error()
        with self._handing_over:
            self._bundle.append(commit)
            self._bundle_bytes += _size(commit)
            if len(self._bundle) >= _BUNDLE_COMMITS or self._bundle_bytes >= _BUNDLE_BYTES:
                self._hand_over()

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything handed over is on disk.

        Raises:
            OSError: writing failed. TimeoutError: it took longer than `timeout` seconds.
        """
        done = self.checkpoint()
        if not done.wait(timeout):
            raise TimeoutError(f"the writer did not finish within {timeout} s")
        self._raise_error()

    def checkpoint(self) -> threading.Event:
        """Ask for everything handed over to be made durable; the event is set when it is, or when writing failed.

        Raises:
            OSError: writing failed earlier.
        """
        self._raise_error()
        done = threading.Event()
        with self._handing_over:
            self._hand_over()
            self._queue.put(done)
        return done

    def _hand_over(self) -> None:
        """Wake the thread with a bundle of commits. Each wake-up costs the scheduler thread a turn of Python's lock."""
        if not self._bundle:
            return
        bundle, size = self._bundle, self._bundle_bytes
        self._bundle, self._bundle_bytes = [], 0
        with self._room:
            # One bundle always fits, however large.
            self._room.wait_for(
                lambda: self._waiting_bytes == 0 or self._waiting_bytes + size <= self._max_waiting_bytes
            )
            self._waiting_bytes += size
            self._waiting_commits += len(bundle)
        self._queue.put(bundle)

    @property
    def waiting(self) -> int:
        """Commits that wait to be written."""
        return self._waiting_commits + len(self._bundle)

    @property
    def capacity(self) -> int:
        """Commits that may wait before `put` blocks."""
        return self._queue.maxsize

    @property
    def error(self) -> BaseException | None:
        """Why writing stopped."""
        return self._error

    def stop(self) -> None:
        """End the thread after what was handed over; nothing may be put afterwards."""
        with self._handing_over:
            self._hand_over()
            self._queue.put(_Stop())

    def _raise_error(self) -> None:
        if self._error is not None:
            raise OSError(f"the writer stopped: {self._error}") from self._error

    def _work(self) -> None:
        item: object = None
        while not isinstance(item, _Stop):
            item = self._queue.get()
            try:
                if self._error is None:
                    if isinstance(item, threading.Event):
                        self._write_part()
                    else:
                        for commit in item:
                            self._take(commit)
            except BaseException as e:  # the scheduler thread must learn of it, whatever it is
                self._error = e
            if isinstance(item, threading.Event):
                item.set()
            else:
                with self._room:
                    self._waiting_bytes -= sum(map(_size, item))
                    self._waiting_commits -= len(item)
                    self._room.notify()

    def _take(self, commit: Commit) -> None:
        if commit.forward is not None:
            self._forwards.append(commit.forward)
        self._spans += commit.spans
        self._rebinds += commit.rebinds
        self._requests += commit.requests
        self._prompts += commit.prompts
        for hook_point, rows in (commit.rows or {}).items():
            self._rows.setdefault(hook_point, []).append(rows)
            self._bytes[hook_point] = self._bytes.get(hook_point, 0) + rows.nbytes
            if (selected := commit.selected.get(hook_point)) is not None:
                self._index.setdefault(hook_point, []).append(selected + self._numbered)
        self._numbered += commit.numbered
        if commit.telemetry is not None:
            self._telemetry.append(commit.telemetry)
        full = len(self._spans) + len(self._forwards) >= _PART_FACTS
        full = full or max(self._bytes.values(), default=0) >= _SHARD_BYTES
        if full or time.monotonic() - self._opened >= self._part_seconds:
            self._write_part()

    def _write_part(self) -> None:
        if not (self._forwards or self._spans or self._requests):
            return
        files: dict[str, str] = {}
        stem = journal.Part(self._part, 0, 0, 0, 0, dp_rank=self._dp_rank).stem
        for hook_point, pieces in self._rows.items():
            name = f"rows/{hook_point}/shard-{stem}.safetensors"
            files[name] = self._save_rows(name, torch.cat(pieces), self._index.get(hook_point))
        for table, table_schema, facts in (
            ("spans", schema.SPANS, self._spans),
            ("forwards", schema.FORWARDS, self._forwards),
            ("rebinds", schema.REBINDS, self._rebinds),
            ("requests", schema.ENGINE_REQUESTS, self._requests),
            ("prompts", schema.PROMPTS, self._prompts),
        ):
            if facts:
                name = f"ledger/{table}-{stem}.parquet"
                table_of_facts = _table(table_schema, facts)
                if table == "spans":
                    table_of_facts = coalesce(table_of_facts)
                files[name] = self._save_table(name, table_of_facts)
        if self._telemetry:
            name = f"{TELEMETRY_FOLDER}/part-{stem}.parquet"
            files[name] = self._save_table(name, _telemetry_table(self._telemetry))
        self.rows_end += self._numbered
        if self._forwards:
            self.forwards_end = self._forwards[-1][0] + 1
        part = journal.Part(
            self._part, self._session, self.forwards_end, self.rows_end, self._numbered, files, dp_rank=self._dp_rank
        )
        journal.append(self._run, part)
        self._part += 1
        self.bytes += sum((self._run / name).stat().st_size for name in files)
        self._clear()

    def _save_rows(self, name: str, rows: torch.Tensor, index: list[np.ndarray] | None) -> str:
        tensors = {ROWS_KEY: rows}
        if index is not None:
            tensors[INDEX_KEY] = torch.from_numpy(np.concatenate(index))
        first = str(self.rows_end)
        return journal.write_durably(
            self._run / name, lambda path: save_file(tensors, path, metadata={"row_start": first})
        )

    def _save_table(self, name: str, table: pa.Table) -> str:
        return journal.write_durably(self._run / name, lambda path: pq.write_table(table, path, compression="zstd"))

    def _clear(self) -> None:
        self._forwards: list[tuple[Any, ...]] = []
        self._spans: list[tuple[Any, ...]] = []
        self._rebinds: list[tuple[Any, ...]] = []
        self._requests: list[tuple[Any, ...]] = []
        self._prompts: list[tuple[Any, ...]] = []
        self._rows: dict[str, list[torch.Tensor]] = {}
        self._bytes: dict[str, int] = {}
        self._index: dict[str, list[np.ndarray]] = {}
        self._telemetry: list[Measured] = []
        self._numbered = 0
        """Rows that were given numbers in this part, selected or not."""
        self._opened = time.monotonic()


def _size(commit: Commit) -> int:
    measured = 0 if commit.telemetry is None else commit.telemetry.nbytes
    return measured + sum(rows.nbytes for rows in (commit.rows or {}).values())


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
        flat = np.concatenate([x.reshape(-1, int(np.prod(x.shape[2:]))) for x in pieces])
        offsets = np.arange(len(flat) + 1, dtype=np.int32) * flat.shape[1]
        columns[name] = pa.ListArray.from_arrays(offsets, flat.ravel())
    fields = schema.TELEMETRY
    arrays = [c if isinstance(c := columns[f.name], pa.Array) else pa.array(c, type=f.type) for f in fields]
    return pa.Table.from_arrays([a.cast(f.type) for a, f in zip(arrays, fields, strict=True)], schema=fields)
