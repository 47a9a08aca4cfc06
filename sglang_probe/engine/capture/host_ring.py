"""Pinned host memory that is there before the first forward.

A copy that does not wait needs pinned memory, and allocating that stops the process that launches kernels: it was the
largest cost of rows that was found on a GPU (docs/evidence/gpu-results.md).
"""

from __future__ import annotations

import threading
import weakref
from collections import deque

import torch

_ALIGNMENT = 256


class HostRing:
    """Memory that is lent from one end and comes back at the other.

    A range comes back when nothing refers to its tensor, or to a view of it, any more, and is lent again after those
    lent before it came back too. Copies are enqueued on one stream, so that a range which comes back while it is still
    being filled is filled by the next copy after that.

    Args:
        nbytes: of the memory.
        pinned: whether it is pinned; not where there is no accelerator, for tests.
    """

    def __init__(self, nbytes: int, *, pinned: bool = True) -> None:
        self._memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned).numpy()
        self._lock = threading.Lock()
        self._start = 0
        """Where the next range begins, if there is room."""
        self._lent: deque[_Range] = deque()
        """In the order in which they were lent."""

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def copy(self, x: torch.Tensor) -> torch.Tensor | None:
        """Enqueue a copy of a contiguous tensor of bytes on the current stream, and return the host tensor, which is
        filled later. None: there is no room."""
        with self._lock:
            room = self._room(x.nbytes)
            if room is None:
                return None
            self._lent.append(room)
            self._start = room.end
        lent = self._memory[room.start : room.start + x.nbytes].reshape(x.shape)
        weakref.finalize(lent, room.came_back).atexit = False
        host = torch.from_numpy(lent)  # its storage refers to `lent` for as long as a view is left
        host.copy_(x, non_blocking=True)
        if x.is_cuda:
            x.record_stream(torch.cuda.current_stream(x.device))
        return host

    def _room(self, nbytes: int) -> _Range | None:
        while self._lent and self._lent[0].back:
            self._lent.popleft()
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if not self._lent:
            return _Range(0, size) if size <= self.nbytes else None
        oldest = self._lent[0].start
        if self._start > oldest:  # lent: from `oldest` to here; free: the rest up to the end, and what is before it
            if self._start + size <= self.nbytes:
                return _Range(self._start, self._start + size)
            return _Range(0, size) if size <= oldest else None
        return _Range(self._start, self._start + size) if self._start + size <= oldest else None


class _Range:
    """Bytes from `start` to `end`, and whether they came back."""

    __slots__ = ("back", "end", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end, self.back = start, end, False

    def came_back(self) -> None:
        """Called from whichever thread gave the memory up last."""
        self.back = True
