"""Taps that a replayed graph writes: one preallocated device buffer, snapshots of it, and their arrival on the host.

Python does not run at replay. What does run are the device operations that were recorded, so a tap is one `copy_` into
memory that was there before the capture and stays (SGLang's own `state_capturer/base.py` works the same way). All
hook points share one buffer, a row of bytes per token: a forward costs one copy of the real rows on its own stream,
because the next replay overwrites the buffer while this one's rows are still travelling, and one transfer to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sglang_probe.engine.capture.host_ring import HostRing
from sglang_probe.engine.capture.transfer import Transfer, upload
from sglang_probe.errors import LedgerError

_ALIGNMENT = 16
_UNWRITTEN = 0xFF
"""Every byte of the first row before a forward. A bf16, fp16 or fp32 row of it is NaN throughout."""
_MARK = 8
"""Bytes from the start of a column that tell whether it was written. A score of one probe is narrower; what follows it
up to the alignment is never written, and stays as it was."""


@dataclass(frozen=True)
class Column:
    """Where the rows of a hook point lie in a row of bytes."""

    start: int
    width: int
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + self.width * self.dtype.itemsize

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """View `[n, width]` of rows of bytes `[n, size]`."""
        return rows[:, self.start : self.end].view(self.dtype)


class GraphTaps:
    """All taps of one model.

    Args:
        columns: width and dtype of what is taken of each hook point's rows.
        capacity: rows of the buffer; at least the largest shape that a graph is captured for. An eager forward with
            more rows gets memory of its own.
        device: where the model is.
        recording: whether the running operations are being recorded into a graph.
        parts: of hook points that hold some columns of a row only, which, ascending int64.
        weights: of hook points that hold scores, the vectors that rows are multiplied with in fp32, `[d, k]`.
        ring: host memory for the rows of forwards; without it, or where it has no room, they go to memory of the
            channel's.
    """

    def __init__(
        self,
        columns: Mapping[str, tuple[int, torch.dtype]],
        *,
        capacity: int,
        device: torch.device | str,
        recording: Callable[[], bool] = lambda: False,
        parts: Mapping[str, torch.Tensor] | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
        ring: HostRing | None = None,
    ) -> None:
        self.columns: dict[str, Column] = {}
        size = 0
        for name, (width, dtype) in columns.items():
            column = self.columns[name] = Column(size, width, dtype)
            size = -(-column.end // _ALIGNMENT) * _ALIGNMENT
        self.buffer = torch.zeros((capacity, size), dtype=torch.uint8, device=device)
        self._ring = ring
        starts = torch.tensor([c.start for c in self.columns.values()], dtype=torch.int64)
        self._marks = (starts[:, None] + torch.arange(_MARK)).flatten().to(device)
        self.recording = recording
        self._parts = {name: part.to(device) for name, part in (parts or {}).items()}
        self._weights = {name: w.to(device) for name, w in (weights or {}).items()}
        self._large: torch.Tensor | None = None
        self._armed = False
        self._written = dict.fromkeys(self.columns, -1)

    @property
    def size(self) -> tuple[int, float]:
        """Rows and megabytes of the buffer."""
        return len(self.buffer), self.buffer.nbytes / 1e6

    @property
    def warming_up(self) -> bool:
        """Where graphs are recorded at all: whether none is being recorded now."""
        return self.buffer.is_cuda and not self.recording()

    def write(self, hook_point: str, x_ND: torch.Tensor) -> None:
        """Copy `x_ND` to the head of the buffer. Only here does the probe put an operation into a graph.

        Raises:
            LedgerError: the tensor is not what the hook point was announced as, or a graph is larger than the buffer.
        """
        column = self.columns[hook_point]
        if hook_point in self._parts:
            x_ND = x_ND.index_select(1, self._parts[hook_point])
        if hook_point in self._weights:
            x_ND = x_ND.float() @ self._weights[hook_point]
        n, width = x_ND.shape
        if width != column.width or x_ND.dtype != column.dtype:
            raise LedgerError(
                f"hook point {hook_point} has rows of {width} {x_ND.dtype}, expected {column.width} {column.dtype}"
            )
        column.of(self._target(n))[:n].copy_(x_ND)
        self._written[hook_point] = n

    def _target(self, n: int) -> torch.Tensor:
        if n <= len(self.buffer):
            return self.buffer
        if self.recording():
            raise LedgerError(f"a graph of {n} tokens is being captured; the taps have room for {len(self.buffer)}")
        if self._large is not None and len(self._large) == n:
            return self._large
        large = self.buffer.new_empty((n, self.buffer.shape[1]))
        if self._armed:  # a warm-up or a forward that nobody records leaves nothing
            self._large = large
        return large

    def arm(self) -> None:
        """Make a tap noticeable that is not written by the coming forward. Enqueued before it, on its stream."""
        self._large, self._armed = None, True
        self._written = dict.fromkeys(self.columns, -1)
        self.buffer[:1].fill_(_UNWRITTEN)

    def marks(self) -> torch.Tensor:
        """The first bytes of every column after a replay, uint8 `[columns * 8]`: for `unwritten`, once on the host."""
        return self.buffer[0].index_select(0, self._marks)

    @staticmethod
    def unwritten(marks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Which columns the graph did not write, bool `[columns]`."""
        return np.asarray((marks.reshape(-1, _MARK) == _UNWRITTEN).all(1))

    def check_recorded(self, tokens: int) -> None:
        """After a graph of `tokens` was captured: every tap must be in it.

        Raises:
            LedgerError: names the hook point that is not.
        """
        for name, written in self._written.items():
            if written != tokens:
                raise LedgerError(
                    f"hook point {name} is not part of the graph captured for {tokens} tokens (saw {max(written, 0)})"
                )
        self._written = dict.fromkeys(self.columns, -1)

    def snapshot(
        self, tokens: int, *, replayed: bool, selected: Mapping[str, np.ndarray[Any, Any]] | None = None
    ) -> Snapshot:
        """Rows of the forward that was just enqueued, still on the device; padding after them stays there.

        Args:
            selected: of hook points that do not hold every token, those that are selected, ascending. Tokens that no
                hook point selects stay on the device too.

        Raises:
            LedgerError: a tap did not fire, or fired with another number of rows than the ledger expects. At replay
                nothing of this is visible from the host; `Snapshot.finish` looks at what arrived.
        """
        source = self.source(tokens, replayed=replayed)
        self.disarm()
        return self._gather(source, tokens, selected or {}, replayed=replayed)

    def source(self, tokens: int, *, replayed: bool) -> torch.Tensor:
        """Where the rows of the forward that was just enqueued lie, `[tokens or more, bytes]`. The next one writes
        there: what reads them has to be enqueued before.

        Raises:
            LedgerError: as `snapshot`.
        """
        if replayed:
            if tokens > len(self.buffer):
                raise LedgerError(f"a graph of {tokens} tokens was replayed; the taps have {len(self.buffer)} rows")
            return self.buffer
        for name, written in self._written.items():
            if written != tokens:
                raise LedgerError(f"hook point {name} saw {max(written, 0)} rows in a forward of {tokens} tokens")
        return self.buffer if self._large is None else self._large

    def disarm(self) -> None:
        """Nothing of this forward will be read any more."""
        self._large, self._armed = None, False
        self._written = dict.fromkeys(self.columns, -1)

    def _gather(
        self, source: torch.Tensor, tokens: int, selected: Mapping[str, np.ndarray[Any, Any]], *, replayed: bool
    ) -> Snapshot:
        if selected.keys() >= self.columns.keys():
            # The first row is taken in any case: it tells whether the taps were written.
            index = np.unique(np.concatenate([np.zeros(1, dtype=np.int64), *selected.values()]))
            if len(index) < tokens:
                rows = source.index_select(0, upload(index, source.device))
                return Snapshot(rows, self.columns, self._ring, replayed=replayed, index=index, selected=selected)
        rows = source if source is not self.buffer else source[:tokens].clone()
        index = np.arange(tokens)
        return Snapshot(rows, self.columns, self._ring, replayed=replayed, index=index, selected=selected)


class Snapshot(Transfer):
    """Rows of one forward pass on their way to the host."""

    def __init__(
        self,
        device_rows: torch.Tensor,
        columns: Mapping[str, Column],
        ring: HostRing | None = None,
        *,
        replayed: bool,
        index: np.ndarray[Any, Any],
        selected: Mapping[str, np.ndarray[Any, Any]],
    ) -> None:
        super().__init__(device_rows)
        self._columns, self._ring = columns, ring
        self._replayed = replayed
        self._index, self._selected = index, selected

    def send(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> None:
        ring = self._ring
        super().send(copy if ring is None else lambda x: copy(x) if (host := ring.copy(x)) is None else host)

    def finish(self) -> dict[str, torch.Tensor]:
        """The rows by hook point, `[selected tokens, width]`, in host memory that nothing else writes; a hook point
        without any is left out.

        Raises:
            LedgerError: they have not arrived, or a tap is missing from the graph that was replayed.
        """
        rows = self.host
        if self._replayed and len(rows):
            starts = [c.start for c in self._columns.values()]
            refuse_unwritten(self._columns, np.minimum.reduceat(rows[0].numpy(), starts) == _UNWRITTEN)
        found = {}
        for name, column in self._columns.items():
            some = self._selected.get(name)
            if some is None or len(some) == len(self._index):
                found[name] = column.of(rows)
            elif len(some):
                found[name] = column.of(rows)[torch.from_numpy(np.searchsorted(self._index, some))]
        return found


def refuse_unwritten(columns: Iterable[str], unwritten: Iterable[bool]) -> None:
    """Refuse a replayed forward one of whose taps still has the pattern of `GraphTaps.arm`.

    Raises:
        LedgerError: names the hook point.
    """
    for name, missing in zip(columns, unwritten, strict=True):
        if missing:
            raise LedgerError(f"hook point {name} was not written by the graph that was replayed")
