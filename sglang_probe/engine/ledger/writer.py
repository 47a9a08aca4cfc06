"""The writer thread: takes commits off the scheduler thread and puts them on disk in parts (see `journal`).

What is handed over is durable at most `part_seconds`, and the time of one write, later, whatever the load. The thread
keeps that clock itself: it waits for a bundle of commits or for the time that a part is due, and then takes whatever
there is, a bundle or not. The scheduler thread only appends to a list; it wakes the thread once per bundle, because
each wake-up costs it a turn of Python's lock.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from sglang_probe.engine.ledger.facts import Commit
from sglang_probe.engine.ledger.part import OpenPart, size_of
from sglang_probe.run import journal, schema

_BUNDLE_BYTES = 4 << 20
_CAPACITY = 1 << 16
_RETRY_SECONDS = 1.0
_LEAST_SECONDS = 0.005
"""Of a part: a thread that never waits would take the processor from the scheduler."""

_READ_SECONDS = 5.0
"""What `read` may take in one turn of the thread: what was handed over waits for the disk as long."""

_OTHERS_CAN_MEND = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE})
"""What somebody may put right while we go on: a full disk, a quota, open files."""


class Writer:
    """Sink of the recorder. `put` blocks while too much is waiting: back-pressure, nothing is dropped.

    Goes on after the durable parts of its rank, if the run has any, and is the only writer of its rank for as long as
    it lives. Once writing has failed (`error`), it stays failed: go on with another `Writer`, on another directory or
    on this one after `stop`.

    Args:
        run: the run directory.
        session: number of this engine process within the run, 0 for the first.
        dp_rank: data-parallel rank of this process.
        part_seconds: how long what was handed over may wait to be durable.
        max_waiting_bytes: bytes of rows and prompts that may wait for the disk before `put` blocks.
        patience: how many seconds a part that the disk does not take (full, over quota, too many open files) is tried
            again before writing has failed. What comes meanwhile waits, within the bounds.
        bundle: commits that are worth waking the thread for.
        clock: seconds, monotonic.
        read: called by the thread with every commit before it is written, once, and whether it is late: then it costs
            the ledger its time, and reads nothing. It does not raise.
        room: commits that may wait; `read` is late while more than half of them do, or half of the bytes, or once it
            took `_READ_SECONDS` of this turn.

    Raises (on construction):
        RunDirectoryError: another process writes there.
    """

    def __init__(
        self,
        run: Path,
        *,
        session: int = 0,
        dp_rank: int = 0,
        part_seconds: float = 20.0,
        max_waiting_bytes: int = 1 << 30,
        patience: float = 0.0,
        bundle: int = 64,
        clock: Callable[[], float] = time.monotonic,
        read: Callable[[Commit, bool], None] | None = None,
        room: int = _CAPACITY,
    ) -> None:
        self._run = run
        self._read, self._room_to_read = read, min(room, _CAPACITY)
        self._lock = journal.lock(run, dp_rank)
        self.bytes = 0
        """Size of all durable parts."""
        self._part_seconds = max(part_seconds, _LEAST_SECONDS)
        self._patience, self._bundle, self._clock = patience, bundle, clock
        self._session, self._dp_rank = session, dp_rank
        parts = journal.read_rank(run, dp_rank)
        self._part = parts[-1].number + 1 if parts else 0
        self.forwards_end = parts[-1].forwards_end if parts else dp_rank << schema.RANK_SHIFT
        """One past the last durable forward pass."""
        self.rows_end = parts[-1].rows_end if parts else dp_rank << schema.RANK_SHIFT
        """One past the last durable row."""
        lock = threading.Lock()
        self._work, self._room = threading.Condition(lock), threading.Condition(lock)
        self._handed: list[Commit] = []
        """Put, and not yet taken by the thread."""
        self._taken: deque[Commit] = deque()
        """Taken, and not yet in the open part."""
        self._handed_bytes = self._taken_bytes = 0
        self._max_waiting_bytes = max_waiting_bytes
        self._asked: list[threading.Event] = []
        self._stopping = self._ended = False
        self._error: BaseException | None = None
        self._failing: OSError | None = None
        self._failing_since = 0.0
        self._due = clock() + self._part_seconds
        self._open = OpenPart()
        self._thread = threading.Thread(target=self._run_thread, name="sglang-probe-writer", daemon=True)
        self._thread.start()

    def put(self, commit: Commit) -> None:
        """Hand over a commit.

        Raises:
            OSError: writing has failed; the capture must stop.
        """
        size = size_of(commit)
        with self._room:
            self._room.wait_for(lambda: self._error is not None or self._fits(size))
            self._raise_error()
            self._handed.append(commit)
            self._handed_bytes += size
            if self._bundled:
                self._work.notify()

    def flush(self, timeout: float | None = None) -> None:
        """Wait until everything handed over is on disk.

        Raises:
            OSError: writing has failed. TimeoutError: it took longer than `timeout` seconds.
        """
        done = self.checkpoint()
        if not done.wait(timeout):
            raise TimeoutError(f"the writer did not finish within {timeout} s")
        self._raise_error()

    def checkpoint(self) -> threading.Event:
        """Ask for everything handed over to be made durable; the event is set when it is, or when writing has failed.

        Raises:
            OSError: writing has failed earlier.
        """
        self._raise_error()
        done = threading.Event()
        with self._work:
            if self._ended:
                done.set()
            self._asked.append(done)
            self._work.notify()
        return done

    @property
    def waiting(self) -> int:
        """Commits that wait to be written."""
        return len(self._handed) + len(self._taken)

    @property
    def half_full(self) -> bool:
        """Whether the bytes that wait are half of what may wait before `put` blocks."""
        return 2 * (self._handed_bytes + self._taken_bytes) > self._max_waiting_bytes

    @property
    def capacity(self) -> int:
        """Commits that may wait before `put` blocks."""
        return _CAPACITY

    @property
    def error(self) -> BaseException | None:
        """Why writing has failed for good."""
        return self._error

    @property
    def failing(self) -> OSError | None:
        """Why the disk does not take a part that is still being tried again (`patience`)."""
        return self._failing

    def stop(self) -> None:
        """End the thread after what was handed over, and let go of the directory; nothing may be put afterwards."""
        with self._work:
            self._stopping = True
            self._work.notify()

    def _fits(self, size: int) -> bool:
        if self.waiting >= _CAPACITY:
            return False
        waiting = self._handed_bytes + self._taken_bytes
        return waiting == 0 or waiting + size <= self._max_waiting_bytes  # one always fits, however large

    @property
    def _bundled(self) -> bool:
        return len(self._handed) >= self._bundle or self._handed_bytes >= _BUNDLE_BYTES

    def _raise_error(self) -> None:
        if self._error is not None:
            raise OSError(f"the writer stopped: {self._error}") from self._error

    def _run_thread(self) -> None:
        while self._turn():
            pass
        with self._work:
            self._ended = True
            for event in self._asked:  # asked after the last turn: nothing is left to write
                event.set()
        self._lock.release()

    def _turn(self) -> bool:
        """Wait for a bundle, a question, or the time of a part; take what there is. False at the end."""
        with self._work:
            self._work.wait_for(self._called, timeout=max(self._due - self._clock(), 0.0))
            asked, self._asked = self._asked, []
            stopping, failed = self._stopping, self._failing is not None
            if not failed:  # else what is handed over waits where the bounds count it
                self._taken.extend(self._handed)
                self._handed = []
                self._taken_bytes, self._handed_bytes = self._handed_bytes, 0
        answered = self._error is not None or self._write(now=bool(asked) or stopping, last=stopping)
        with self._room:
            if self._error is not None:
                self._handed, self._handed_bytes = [], 0
                self._taken.clear()
            if answered:
                self._taken_bytes = 0
            left = failed and bool(self._handed)  # the disk takes parts again, and this was not taken yet
            if left or not answered:
                self._asked, asked = asked + self._asked, []
            self._room.notify_all()
        for event in asked:
            event.set()
        return left or not stopping

    def _called(self) -> bool:
        if self._failing is not None:  # nothing but the time of the next attempt
            return self._stopping
        return self._stopping or bool(self._asked) or self._bundled

    def _write(self, *, now: bool, last: bool) -> bool:
        """Put what was taken into the open part, and write it if it is due. False: it will be tried again."""
        began = self._clock()
        due = now or began >= self._due
        if due:
            self._due = began + self._part_seconds  # of what is handed over from here on
        try:
            if self._failing is not None:
                self._write_part()
                self._failing = None
            while self._taken:
                commit = self._taken.popleft()
                if self._read is not None:
                    self._read(commit, self._late(began))
                self._open.take(commit)
                if self._open.full:
                    self._write_part()
            if due:
                self._write_part()
        except BaseException as e:  # the scheduler thread must learn of it, whatever it is
            if self._failing is None:
                self._failing_since = began
            patient = not last and began - self._failing_since < self._patience
            if isinstance(e, OSError) and e.errno in _OTHERS_CAN_MEND and patient:
                self._failing = e
                self._due = self._clock() + min(_RETRY_SECONDS, self._patience)
                return False
            self._error = e
        return True

    def _late(self, began: float) -> bool:
        """Whether reading commits would cost the ledger facts, or the scheduler a wait. Part of what waits may be
        counted that does not any more: then less is read."""
        waiting = self._handed_bytes + self._taken_bytes
        if 2 * self.waiting > self._room_to_read or 2 * waiting > self._max_waiting_bytes:
            return True
        return self._clock() - began > _READ_SECONDS

    def _write_part(self) -> None:
        if self._open.empty:
            return
        number = journal.Part(self._part, 0, 0, 0, 0, dp_rank=self._dp_rank)
        files = self._open.write(self._run, number.stem, row_start=self.rows_end)
        forwards_end = self._open.forwards_end or self.forwards_end
        rows_end = self.rows_end + self._open.numbered
        part = journal.Part(
            self._part, self._session, forwards_end, rows_end, self._open.numbered, files, dp_rank=self._dp_rank
        )
        journal.append(self._run, part)
        self._part += 1
        self.forwards_end, self.rows_end = forwards_end, rows_end
        self.bytes += sum((self._run / name).stat().st_size for name in files)
        self._open = OpenPart()
