"""A live recording: the recorder's sink, and the thread that keeps its segments.

The scheduler thread only counts and hands over. Everything that touches the disk or waits is done by the writer's
thread and by the *keeper* here: it opens and closes segments, and publishes metrics. One lock orders commits and the
change of segments; it is held for microseconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_probe.engine.ledger.recorder import Commit, ForwardPlan
from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.engine.live import provenance, segments
from sglang_probe.engine.live.config import LiveConfig
from sglang_probe.engine.live.metrics import Metrics
from sglang_probe.engine.live.names import Names
from sglang_probe.engine.live.overflow import Overflow
from sglang_probe.engine.live.privacy import Redactor
from sglang_probe.engine.live.totals import Totals
from sglang_probe.run import schema

logger = logging.getLogger("sglang_probe")

_PATIENCE = 30.0
"""Seconds that a full disk is waited for before the recording stops."""

_ROW_START = schema.SPANS.get_field_index("row_start")
_FORWARD_ROW_START = schema.FORWARDS.get_field_index("row_start")


class LiveRecording:
    """Sink of the recorder of a live server.

    Args:
        root: the directory that holds the segments.
        facts: manifest fields that are the same for all segments.
        drops: whether facts are dropped when the queue is full; else `put` waits.
        metrics: Prometheus series to keep up to date.
        tick: seconds between two looks of the keeper.

    Raises (on construction):
        RunDirectoryError: another server records there.
    """

    def __init__(
        self,
        root: Path,
        config: LiveConfig,
        facts: Mapping[str, Any],
        *,
        part_seconds: float = 20.0,
        drops: bool = True,
        metrics: Metrics | None = None,
        tick: float = 1.0,
    ) -> None:
        self._root, self._config, self._facts = root, config, facts
        self._part_seconds, self._drops, self._metrics, self._tick = part_seconds, drops, metrics, tick
        self._handle = segments.lock(root)
        self.totals = Totals(config.recent)
        self.names = Names()
        self._redactor = Redactor(config.privacy)
        self._overflow = Overflow()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._end: tuple[str, str | None] = ("complete", None)
        self._asked = self._done = 0
        self._last_closed: Path | None = None
        self._closed = 0
        self._keeper_errors = 0
        self._recovered = segments.recover(root)
        self._number = segments.next_number(root)
        self._path = segments.open_segment(root, self._number, True, facts)
        self._row_base = self._facts_in_segment = self._requests_in_segment = 0
        self._opened = 0.0
        self._due_since: float | None = None
        self._begin(self._new_writer(self._path))
        self._thread = threading.Thread(target=self._keep, name="sglang-probe-keeper", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- scheduler thread

    def launched(self, plan: ForwardPlan, asking: set[str]) -> None:
        """A forward pass was launched; `asking` are its requests that want their provenance."""
        with self._lock:
            self.totals.launch(plan, asking)

    def ending(self, rid: str, prompt_ids: Any) -> None:
        """A request is about to end."""
        self._redactor.ending(rid, prompt_ids)

    def put(self, commit: Commit) -> None:
        """Take a commit.

        Raises:
            OSError: writing failed. LedgerError: the disk has been too slow for too long.
        """
        with self._lock:
            self.totals.count(commit)
            self._redactor.apply(commit)
            if self._row_base and commit.numbered:
                _rebase(commit, self._row_base)
            self._facts_in_segment += 1
            self._requests_in_segment += len(commit.requests)
            if self._drops and self._writer.error is None and self._writer.waiting >= self._room:
                self.totals.dropped(commit)
                self._overflow.absorb(commit)
                return
            late = self._overflow.release()
            if late is not None:
                self._writer.put(late)
            self._writer.put(commit)

    def provenance(self, rid: str) -> list[provenance.Span] | None:
        """Spans of a request that is just finishing; None if it did not ask."""
        rid = self.names.get(rid)
        entry = self.totals.active.get(rid)
        if entry is None or entry.spans is None:
            return None
        current = self.totals.pending[0] if self.totals.pending else None
        return provenance.with_current(entry.spans, current, rid)

    def ask_flush(self) -> int:
        """Have the current segment closed soon. Returns the number to wait for in `status()["flush"]["done"]`."""
        self._asked += 1
        self._wake.set()
        return self._asked

    def status(self) -> dict[str, Any]:
        """Counts and state, as plain data."""
        t = self.totals
        return {
            "run": str(self._root),
            "dp_rank": self._facts.get("dp_rank", 0),
            "privacy": self._config.privacy,
            "segment": {
                "number": self._number,
                "path": str(self._path),
                "seconds": round(time.monotonic() - self._opened, 1),
                "requests": self._requests_in_segment,
                "megabytes": round(self._writer.bytes / 1e6, 3),
            },
            "segments_closed": self._closed,
            "segments_interrupted_before": [p.name for p in self._recovered],
            "requests": t.requests,
            "requests_in_flight": len(t.active),
            "forwards": t.forwards,
            "forwards_dropped": self._overflow.forwards,
            "rows": t.rows,
            "positions": dict(t.positions),
            "queue": {"waiting": self._writer.waiting, "size": self._room},
            "write_errors": self.write_errors,
            "flush": {"asked": self._asked, "done": self._done, "segment": _text(self._last_closed)},
            "recent": t.recent(),
        }

    @property
    def write_errors(self) -> int:
        return self._keeper_errors + (self._writer.error is not None)

    def flush(self) -> None:
        """What the writer of a harvest does at its end: everything is on disk, and nothing more comes."""
        self.close()

    def close(self, *, status: str = "complete", fault: str | None = None, timeout: float = 20.0) -> None:
        """Close the current segment and end. Called once, when the server ends or the probe has failed."""
        if self._closing:
            return
        self._end = (status, fault)
        self._closing = True
        self._wake.set()
        self._thread.join(timeout)

    # ---------------------------------------------------------------- keeper

    def _keep(self) -> None:
        while not self._closing:
            self._wake.wait(self._tick)
            self._wake.clear()
            try:
                self._turn()
            except Exception:
                self._keeper_errors += 1
                logger.exception("sglang-probe could not keep the segments of %s", self._root)
        try:
            status, fault = self._end
            with self._lock:
                late, lengths = self._overflow.release(), self._prompt_lens()
            self._finish(self._path, self._writer, status, late, lengths if fault is None else None, fault)
            self._publish()
        except Exception:
            self._keeper_errors += 1
            logger.exception("sglang-probe could not close %s", self._path)

    def _turn(self) -> None:
        asked = self._asked
        if asked > self._done or self._due():
            self._rotate()
            self._done = asked
        with self._lock:  # what was dropped last goes out even if no commit follows that could take it along
            if self._writer.error is None and self._writer.waiting < self._room:
                late = self._overflow.release()
                if late is not None:
                    self._writer.put(late)
        self._publish()

    def _due(self) -> bool:
        limits = self._config.segments
        age = time.monotonic() - self._opened
        due = (
            age >= limits.max_seconds
            or self._writer.bytes >= limits.max_megabytes * 1e6
            or self._requests_in_segment >= limits.max_requests
        )
        if not due or not self._facts_in_segment:
            self._due_since = None
            return False
        self._due_since = self._due_since or time.monotonic()
        return not self.totals.active or time.monotonic() - self._due_since >= limits.patience

    def _rotate(self) -> None:
        if not self._facts_in_segment:
            return
        path = segments.open_segment(self._root, self._number + 1, False, self._facts)
        writer = self._new_writer(path)
        with self._lock:
            old_path, old_writer = self._path, self._writer
            late = self._overflow.release()
            carried = self.totals.carried()
            lengths = self._prompt_lens()
            self._path, self._number = path, self._number + 1
            self._begin(writer)
            self.names.new_segment(rid for rid in carried if rid not in lengths)
        segments.note_carried(path, carried)
        self._finish(old_path, old_writer, "complete", late, lengths, None)

    def _finish(
        self,
        path: Path,
        writer: Writer,
        status: str,
        late: Commit | None,
        lengths: dict[str, int] | None,
        fault: str | None,
    ) -> None:
        try:
            if writer.error is None:
                if late is not None:
                    writer.put(late)
                writer.flush(timeout=120)
        finally:
            writer.stop()
        segments.close_segment(path, status, prompt_lens=lengths, fault=fault)
        self._closed += 1
        self._last_closed = path

    def _prompt_lens(self) -> dict[str, int]:
        return {rid: entry.prompt_len for rid, entry in self.totals.active.items()}

    def _begin(self, writer: Writer) -> None:
        self._writer = writer
        self._room = min(self._config.queue, writer.capacity - 2)  # two puts may follow, and must not block
        self._opened = time.monotonic()
        self._due_since = None
        self._row_base = self.totals.rows
        self._facts_in_segment = self._requests_in_segment = 0

    def _new_writer(self, path: Path) -> Writer:
        # Woken before the queue is full, however short: waiting is for the disk alone.
        bundle = max(1, min(64, self._config.queue // 2))
        return Writer(path, part_seconds=self._part_seconds, patience=_PATIENCE, bundle=bundle)

    def _publish(self) -> None:
        if self._metrics is not None:
            self._metrics.publish(self.totals, waiting=self._writer.waiting, write_errors=self.write_errors)


def _rebase(commit: Commit, base: int) -> None:
    """Number rows from the start of the segment."""
    i = _ROW_START
    commit.spans = [(*s[:i], s[i] - base, *s[i + 1 :]) if s[i] >= 0 else s for s in commit.spans]
    if commit.forward is not None and commit.forward[_FORWARD_ROW_START] >= 0:
        f, j = commit.forward, _FORWARD_ROW_START
        commit.forward = (*f[:j], f[j] - base, *f[j + 1 :])


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
