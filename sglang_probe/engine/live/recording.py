"""A live recording: the recorder's sink, and the thread that keeps its segments.

The scheduler thread only counts and hands over. Everything that touches the disk or waits is done by the writer's
thread and by the *keeper* here: it opens and closes segments, publishes metrics, and begins again after a stop. One
lock orders commits and the change of segments; it is held for microseconds.

A recording that stops (`Stops`) does not end: its segment is closed as `incomplete`, and as soon as another one can be
opened a new *epoch* begins in it. The scheduler thread follows at its next launch, with a recorder that knows nothing
of what was before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_probe.engine.ledger.facts import Commit, ForwardPlan
from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.engine.live import provenance, segments
from sglang_probe.engine.live.closing import Stopped, close_stopped, finish
from sglang_probe.engine.live.config import LiveConfig
from sglang_probe.engine.live.metrics import Metrics
from sglang_probe.engine.live.monitor import LiveMonitor
from sglang_probe.engine.live.names import Names
from sglang_probe.engine.live.overflow import Overflow
from sglang_probe.engine.live.privacy import Redactor
from sglang_probe.engine.live.sink import Sink, rebase
from sglang_probe.engine.live.stops import DISK, Stops
from sglang_probe.engine.live.totals import Totals

logger = logging.getLogger("sglang_probe")

_CLOSE_AGAIN = 60.0
"""Age of a segment at which the closing of an earlier one that failed is tried again."""

_REASONS = 100
"""Requests of a segment of which the manifest says why they could not be accounted for."""

_PATIENCE = 30.0
"""Seconds that a full disk is waited for before the recording stops."""


class LiveRecording:
    """Sink of the recorder of a live server.

    Args:
        root: the directory that holds the segments.
        facts: manifest fields that are the same for all segments.
        drops: whether facts are dropped when the queue is full; else `put` waits.
        metrics: Prometheus series to keep up to date.
        monitor: reads and judges what is served, on the writers' threads.
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
        monitor: LiveMonitor | None = None,
        tick: float = 1.0,
    ) -> None:
        self._root, self._config, self._facts = root, config, facts
        self._part_seconds, self._drops, self._metrics, self._tick = part_seconds, drops, metrics, tick
        self.monitor = monitor
        self._order = 0
        """Commits that were handed to writers."""
        self._handle = segments.lock(root)
        self.totals = Totals(config.recent)
        self.names = Names()
        self.stops = Stops()
        self.epoch = 1
        """Raised when the recording begins again after a stop."""
        self.weights: list[dict[str, Any]] = [{"number": 0, "how": "model_path"}]
        """What the engine's weights were, by the number of updates before."""
        self._redactor = Redactor(config.privacy)
        self._overflow = Overflow()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._end: tuple[str, str | None] = ("complete", None)
        self._asked = self._done = 0
        self._last_closed: Path | None = None
        self._nothing_new = False
        self._closed = 0
        self._keeper_errors = 0
        self._unclosed: list[Stopped] = []
        self._recovered = segments.recover(root)
        self._number = segments.next_number(root)
        self._path = segments.open_segment(root, self._number, True, self._facts_now())
        self._pause = tick
        self._due_since: float | None = None
        self._carried_in: dict[str, list[int]] = {}
        self._lost: dict[str, str] = {}
        self._opened = self._closable = 0.0
        self._row_base = self._facts_in_segment = self._requests_in_segment = self._weights_at_opening = 0
        self._carried_told = True
        self._begin(self._new_writer(self._path))
        self._closable = self._opened  # the first flush need not wait
        self._thread = threading.Thread(target=self._keep, name="sglang-probe-keeper", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- scheduler thread

    def name(self, rid: str) -> str:
        """A name in the ledger for a new request."""
        with self._lock:
            return self.names.name(rid)

    def launched(self, plan: ForwardPlan, asking: set[str]) -> None:
        """A forward pass was launched; `asking` are its requests that want their provenance."""
        with self._lock:
            self.totals.launch(plan, asking)
            for rid, at in plan.carried.items():
                self._carried_in[rid] = list(at)
                self._carried_told = False

    def ending(self, rid: str, prompt_ids: Any) -> None:
        """A request is about to end."""
        self._redactor.ending(rid, prompt_ids)

    def sink(self) -> Sink:
        """Where the recorder of the present epoch puts its commits."""
        return Sink(self, self.epoch)

    def put(self, commit: Commit, epoch: int | None = None) -> None:
        """Take a commit; one of an earlier epoch is not wanted any more.

        Raises:
            OSError: writing failed. DiskTooSlow: for too long.
        """
        with self._lock:
            if self.stops.fault is not None or epoch not in (None, self.epoch):
                return
            self.totals.count(commit)
            self._redactor.apply(commit)
            if self._row_base and commit.numbered:
                rebase(commit, self._row_base)
            for rid, reason in commit.lost[: max(_REASONS - len(self._lost), 0)]:
                self._lost[rid] = reason[:500]
            self._facts_in_segment += 1
            self._requests_in_segment += len(commit.requests)
            if self._drops and self._writer.error is None and self._writer.waiting >= self._room:
                self.totals.dropped(commit)
                self._overflow.absorb(commit)
                return
            late = self._overflow.release()
            if late is not None:
                self._hand(late)
            self._hand(commit)

    def _hand(self, commit: Commit) -> None:
        """Hand a commit to a writer, with its place in the order of all of them."""
        self._numbered(commit)
        self._writer.put(commit)

    def _numbered(self, commit: Commit | None) -> Commit | None:
        if commit is not None and self.monitor is not None:
            commit.order = self._order
            self._order += 1
        return commit

    def weights_changed(self, entry: Mapping[str, Any]) -> None:
        """The engine's weights were updated: another segment begins soon."""
        with self._lock:
            self.weights = [*self.weights[-_REASONS:], dict(entry)]
        self._wake.set()

    def provenance(self, rid: str) -> list[provenance.Span] | None:
        """Spans of a request that is just finishing, by its name; None if it did not ask."""
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

    def stop(self, fault: str, reason: str, epoch: int | None = None) -> None:
        """Nothing can be recorded for now; from any thread.

        Args:
            reason: one of `stops.REASONS`.
            epoch: what has failed; if another one has begun since, that goes on.
        """
        with self._lock:
            if self._closing or self.stops.fault is not None or epoch not in (None, self.epoch):
                return
            self.stops.stop(fault, reason)
            self._unclosed.append(Stopped(self._path, self._writer, fault, self._told()))
        self._wake.set()

    def status(self) -> dict[str, Any]:
        """Counts and state, as plain data."""
        t = self.totals
        return {
            **self.stops.state(),
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
            "weights": self.weights[-1],
            "requests": t.requests,
            "requests_in_flight": len(t.active),
            "requests_unaccounted": t.unaccounted,
            "forwards": t.forwards,
            "forwards_dropped": self._overflow.forwards,
            "rows": t.rows,
            "positions": dict(t.positions),
            "queue": {"waiting": self._writer.waiting, "size": self._room},
            "disk": None if (failing := self._writer.failing) is None else str(failing),
            "write_errors": self.write_errors,
            "flush": {
                "asked": self._asked,
                "done": self._done,
                "segment": None if self._last_closed is None else str(self._last_closed),
                "nothing_new": self._nothing_new,
                "at_most_every": self._config.segments.min_seconds,
            },
            **({} if self.monitor is None else {"monitor": self.monitor.alerts()}),
            "recent": t.recent(),
        }

    @property
    def write_errors(self) -> int:
        return self._keeper_errors + self.stops.counts[DISK]

    def flush(self) -> None:
        """What the writer of a harvest does at its end: everything is on disk, and nothing more comes."""
        self.close()

    def close(self, *, status: str = "complete", fault: str | None = None, timeout: float = 20.0) -> None:
        """Close the current segment and end. Called once, when the server ends or has crashed."""
        if self._closing:
            return
        self._end = (status, fault)
        self._closing = True
        self._wake.set()
        self._thread.join(timeout)

    # ---------------------------------------------------------------- keeper

    def _keep(self) -> None:
        while not self._closing:
            self._wake.wait(self._pause)
            self._wake.clear()
            self._pause = self._tick
            try:
                self._turn()
            except Exception:
                self._keeper_errors += 1
                logger.exception("sglang-probe could not keep the segments of %s", self._root)
        self._close_stopped()
        if self.stops.fault is not None:
            self._publish()
            return
        try:
            status, fault = self._end
            with self._lock:
                late, lengths = self._numbered(self._overflow.release()), self._prompt_lens()
            known = lengths if fault is None else None
            self._finish(self._path, self._writer, status, late, lengths=known, fault=fault, told=self._told())
            self._publish()
        except Exception:
            self._keeper_errors += 1
            logger.exception("sglang-probe could not close %s", self._path)

    def _turn(self) -> None:
        if self.stops.fault is None and (error := self._writer.error) is not None:
            self.stop(f"the writer stopped: {error}", DISK)  # seen here while nothing is served
        if self.stops.fault is not None:
            self._publish()
            if self.stops.due:
                self._begin_again()
            return
        if self._unclosed and time.monotonic() - self._opened > _CLOSE_AGAIN:
            self._close_stopped()
        asked = self._asked
        flush = asked > self._done or self.weights[-1]["number"] > self._weights_at_opening
        if flush and not self._facts_in_segment:
            self._done, self._nothing_new = asked, True
            self._weights_at_opening = self.weights[-1]["number"]
            segments.note(self._path, weights=self.weights)
        elif (flush and self._old_enough()) or self._due():
            try:
                self._rotate()
            finally:
                self._done, self._nothing_new = asked, False
        with self._lock:  # what was dropped last goes out even if no commit follows that could take it along
            if self._writer.error is None and self._writer.waiting < self._room:
                late = self._overflow.release()
                if late is not None:
                    self._hand(late)
        if self.monitor is not None:
            self._write_drift(None)
        if not self._carried_told:
            self._carried_told = True
            try:
                segments.note_carried(self._path, dict(self._carried_in))
            except Exception:
                self._carried_told = False
                raise
        self._publish()

    def _old_enough(self) -> bool:
        """Whether the segment may be closed on demand: clients could make any number of segments otherwise."""
        wait = self._closable - time.monotonic()
        self._pause = min(max(wait, 0.001), self._tick)
        return wait <= 0

    def _due(self) -> bool:
        limits = self._config.segments
        age, size = time.monotonic() - self._opened, self._writer.bytes / 1e6
        due = limits.reached(seconds=age, megabytes=size, requests=self._requests_in_segment)
        if not due or not self._facts_in_segment:
            self._due_since = None
            return False
        self._due_since = self._due_since or time.monotonic()
        return not self.totals.active or time.monotonic() - self._due_since >= limits.patience

    def _rotate(self) -> None:
        if not self._facts_in_segment:
            return
        path = segments.open_segment(self._root, self._number + 1, False, self._facts_now())
        writer = self._new_writer(path)
        with self._lock:
            stopped = self.stops.fault is not None  # meanwhile
            if not stopped:
                old_path, old_writer, told = self._path, self._writer, self._told()
                late = self._numbered(self._overflow.release())
                carried = self.totals.carried()
                lengths = self._prompt_lens()
                self._path, self._number = path, self._number + 1
                self._begin(writer)
                self._carried_in = dict(carried)
                self.names.new_segment(carried)
        if stopped:
            writer.stop()
            segments.remove(path)
            return
        segments.note_carried(path, carried)
        self._finish(old_path, old_writer, "complete", late, lengths=lengths, fault=None, told=told)

    def _begin_again(self) -> None:
        """Close what has stopped and, when its time has come, open the next segment."""
        self._close_stopped()
        path: Path | None = None
        try:
            number = max(segments.next_number(self._root), self._number + 1)
            path = segments.open_segment(self._root, number, True, self._facts_now())
            writer = self._new_writer(path)
        except Exception:
            self._keeper_errors += 1
            self.stops.postpone()
            logger.exception("sglang-probe cannot record into %s yet; it will try again", self._root)
            if path is not None:
                segments.remove(path)
            return
        with self._lock:
            self._path, self._number = path, number
            self.totals.forget_in_flight()
            self._redactor.forget()
            dropped, self._overflow = self._overflow.forwards, Overflow()
            self._overflow.forwards = dropped
            if self.monitor is not None:
                self.monitor.forget(self._order)
            self._begin(writer)
            self.names.forget()
            self.epoch += 1
            self.stops.resume()
        logger.warning("sglang-probe records again, into %s", path)
        self._publish()

    def _close_stopped(self) -> None:
        closed, failed = close_stopped(self._root, self._unclosed)
        self._closed += closed
        self._keeper_errors += failed

    def _finish(self, path: Path, writer: Writer, status: str, late: Commit | None, **rest: Any) -> None:
        try:
            finish(path, writer, status, late, read=self._monitored, **rest)
        finally:
            self._closed += 1
            self._last_closed = path

    def _told(self) -> dict[str, Any]:
        """What the manifest of the current segment says at its end besides the counts."""
        return {"weights": self.weights, "unaccounted": dict(self._lost), "carried_in": dict(self._carried_in)}

    def _monitored(self, path: Path) -> dict[str, Any]:
        """What the manifest of a segment says of its monitor, once all of it was read."""
        if self.monitor is None:
            return {}
        line = self.monitor.line(path.name)
        self._write_drift(line)
        return {"monitor": {**self.monitor.facts(), "drift_log": line}}

    def _write_drift(self, line: dict[str, Any] | None) -> None:
        """Append to the drift log; what the disk does not take is tried again, and holds up nothing else."""
        assert self.monitor is not None
        try:
            self.monitor.write_log(self._root, line)
        except OSError as e:
            self._keeper_errors += 1
            logger.error("sglang-probe could not write the drift log of %s: %s", self._root, e)

    def _facts_now(self) -> dict[str, Any]:
        monitor = {} if self.monitor is None else {"monitor": self.monitor.facts()}
        return {**self._facts, **monitor, "weights": self.weights}

    def _prompt_lens(self) -> dict[str, int]:
        return {rid: entry.prompt_len for rid, entry in self.totals.active.items()}

    def _begin(self, writer: Writer) -> None:
        self._writer = writer
        self._room = min(self._config.queue, writer.capacity - 2)  # two puts may follow, and must not block
        self._opened = time.monotonic()
        self._closable = self._opened + self._config.segments.min_seconds
        self._due_since = None
        self._row_base = self.totals.rows
        self._facts_in_segment = self._requests_in_segment = 0
        self._weights_at_opening = self.weights[-1]["number"]
        self._carried_in, self._carried_told = {}, True
        self._lost = {}

    def _new_writer(self, path: Path) -> Writer:
        # Woken before the queue is full, however short: waiting is for the disk alone.
        bundle = max(1, min(64, self._config.queue // 2))
        monitor, segment = self.monitor, path.name
        read = None if monitor is None else lambda commit, late: monitor.read(commit, segment, late=late)
        return Writer(
            path,
            part_seconds=self._part_seconds,
            patience=_PATIENCE,
            bundle=bundle,
            read=read,
            room=self._config.queue,
        )

    def _publish(self) -> None:
        if self._metrics is not None:
            self._metrics.publish(
                self.totals,
                waiting=self._writer.waiting,
                write_errors=self.write_errors,
                stops=self.stops,
                monitor=None if self.monitor is None else self.monitor.status(),
            )
