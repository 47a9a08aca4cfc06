"""The thread of a live recording that opens and closes segments, publishes metrics, and begins again after a stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_probe.engine.ledger.writer import Writer
from sglang_probe.engine.live import segments
from sglang_probe.engine.live.causes import Causes
from sglang_probe.engine.live.closing import close_stopped, finish
from sglang_probe.engine.live.config import LiveConfig
from sglang_probe.engine.live.metrics import Metrics
from sglang_probe.engine.live.open_segment import Handover, OpenSegment
from sglang_probe.engine.live.stops import DISK
from sglang_probe.remote.process import Uploading

if TYPE_CHECKING:
    from sglang_probe.engine.live.recording import LiveRecording

logger = logging.getLogger("sglang_probe")

_CLOSE_AGAIN = 60.0
"""Age of a segment at which the closing of an earlier one that failed is tried again."""

_PATIENCE = 30.0
"""Seconds that a full disk is waited for before the recording stops."""


class Keeper:
    """Keeps the segments of one recording. The first one is opened at construction.

    Args:
        live: the recording. Others: see `LiveRecording`.

    Raises (on construction):
        RunDirectoryError: another server records there.
    """

    def __init__(
        self,
        live: LiveRecording,
        root: Path,
        config: LiveConfig,
        facts: Mapping[str, Any],
        *,
        part_seconds: float,
        metrics: Metrics | None,
        tick: float,
    ) -> None:
        self._live, self._root, self._config, self._facts = live, root, config, facts
        self._part_seconds, self._metrics, self._tick = part_seconds, metrics, tick
        self.closing = False
        self.errors = 0
        """Times that the keeper itself could not do its work."""
        self._handle = segments.lock(root)
        self._causes = Causes() if config.causes and metrics is not None else None
        self._wake = threading.Event()
        self._pause = tick
        self._end: tuple[str, str | None] = ("complete", None)
        self._asked = self._done = 0
        self._last_closed: Path | None = None
        self._nothing_new = False
        self._closed = 0
        self._recovered = segments.recover(root)
        live.segment = self._open(segments.next_number(root), first=True)
        live.segment.closable = live.segment.opened  # the first flush need not wait
        self._upload = None if config.upload is None else Uploading(root, config.upload, single=False)
        self._thread = threading.Thread(target=self._keep, name="sglang-probe-keeper", daemon=True)

    # ---------------------------------------------------------------- any thread

    def start(self) -> None:
        """Begin to keep."""
        self._thread.start()

    def wake(self) -> None:
        """Look now, not at the next tick."""
        self._wake.set()

    def ask_flush(self) -> int:
        """See `LiveRecording.ask_flush`."""
        self._asked += 1
        self._wake.set()
        return self._asked

    def close(self, status: str, fault: str | None, timeout: float) -> None:
        """See `LiveRecording.close`."""
        if self.closing:
            return
        self._end = (status, fault)
        self.closing = True
        self._wake.set()
        self._thread.join(timeout)
        if self._upload is not None:
            self._upload.end()

    def state(self) -> dict[str, Any]:
        """Its part of `LiveRecording.status`."""
        return {
            "run": str(self._root),
            "segments_closed": self._closed,
            "segments_interrupted_before": [p.name for p in self._recovered],
            "flush": {
                "asked": self._asked,
                "done": self._done,
                "segment": None if self._last_closed is None else str(self._last_closed),
                "nothing_new": self._nothing_new,
                "at_most_every": self._config.segments.min_seconds,
            },
            **({} if self._upload is None else {"upload": self._upload.state()}),
        }

    # ---------------------------------------------------------------- its own thread

    def _keep(self) -> None:
        live = self._live
        while not self.closing:
            self._wake.wait(self._pause)
            self._wake.clear()
            self._pause = self._tick
            try:
                self._turn()
            except Exception:
                self.errors += 1
                logger.exception("sglang-probe could not keep the segments of %s", self._root)
        self._close_stopped()
        if self._causes is not None:
            self._causes.close()
        if live.stops.fault is not None:
            self._publish()
            return
        try:
            status, fault = self._end
            self._finish(live.last(), status, fault)
            self._publish()
        except Exception:
            self.errors += 1
            logger.exception("sglang-probe could not close %s", live.segment.path)

    def _turn(self) -> None:
        live, segment = self._live, self._live.segment
        if live.stops.fault is None and (error := segment.writer.error) is not None:
            live.stop(f"the writer stopped: {error}", DISK)  # seen here while nothing is served
        if live.stops.fault is not None:
            self._publish()
            if live.stops.due:
                self._begin_again()
            return
        if live.unclosed and segment.seconds > _CLOSE_AGAIN:
            self._close_stopped()
        asked = self._asked
        flush = asked > self._done or live.weights[-1]["number"] > segment.weights
        if flush and not segment.commits:
            self._done, self._nothing_new = asked, True
            segment.weights = live.weights[-1]["number"]
            segments.note(segment.path, weights=live.weights)
        elif (flush and self._old_enough()) or self._due():
            try:
                self._rotate()
            finally:
                self._done, self._nothing_new = asked, False
        live.release_late()
        if self._causes is not None:
            self._causes.turn()
        if live.monitor is not None:
            self._write_drift(None)
        self._tell_carried()
        self._publish()

    def _tell_carried(self) -> None:
        """The manifest on disk says which requests began in the segment before."""
        segment = self._live.segment
        if segment.carried_told:
            return
        segment.carried_told = True
        try:
            segments.note_carried(segment.path, dict(segment.carried_in))
        except Exception:
            segment.carried_told = False
            raise

    def _old_enough(self) -> bool:
        """Whether the segment may be closed on demand: clients could make any number of segments otherwise."""
        wait = self._live.segment.closable - time.monotonic()
        self._pause = min(max(wait, 0.001), self._tick)
        return wait <= 0

    def _due(self) -> bool:
        limits, segment = self._config.segments, self._live.segment
        due = limits.reached(seconds=segment.seconds, megabytes=segment.megabytes, requests=segment.requests)
        if not due or not segment.commits:
            segment.due_since = None
            return False
        segment.due_since = segment.due_since or time.monotonic()
        return not self._live.totals.active or time.monotonic() - segment.due_since >= limits.patience

    def _rotate(self) -> None:
        if not self._live.segment.commits:
            return
        segment = self._open(self._live.segment.number + 1, first=False)
        done = self._live.go_on_in(segment)
        if done is None:
            segment.writer.stop()
            segments.remove(segment.path)
            return
        segments.note_carried(segment.path, done.carried)
        self._finish(done, "complete", None)

    def _begin_again(self) -> None:
        """Close what has stopped and, when its time has come, open the next segment."""
        self._close_stopped()
        try:
            number = max(segments.next_number(self._root), self._live.segment.number + 1)
            segment = self._open(number, first=True)
        except Exception:
            self.errors += 1
            self._live.stops.postpone()
            logger.exception("sglang-probe cannot record into %s yet; it will try again", self._root)
            return
        self._live.begin_again_in(segment)
        logger.warning("sglang-probe records again, into %s", segment.path)
        self._publish()

    def _open(self, number: int, *, first: bool) -> OpenSegment:
        """A new segment on disk, with its writer; nothing is left of it if that fails."""
        weights = self._live.weights
        path = segments.open_segment(self._root, number, first, self._facts_now(weights))
        try:
            writer = self._writer(path)
        except Exception:
            segments.remove(path)
            raise
        return OpenSegment(
            path,
            number,
            writer,
            queue=self._config.queue,
            min_seconds=self._config.segments.min_seconds,
            row_base=self._live.totals.rows,
            weights=weights[-1]["number"],
        )

    def _writer(self, path: Path) -> Writer:
        # Woken before the queue is full, however short: waiting is for the disk alone.
        bundle = max(1, min(64, self._config.queue // 2))
        monitor, segment = self._live.monitor, path.name
        read = None if monitor is None else lambda commit, late: monitor.read(commit, segment, late=late)
        return Writer(
            path,
            part_seconds=self._part_seconds,
            patience=_PATIENCE,
            bundle=bundle,
            read=read,
            room=self._config.queue,
        )

    def _facts_now(self, weights: list[dict[str, Any]]) -> dict[str, Any]:
        monitor = self._live.monitor
        return {**self._facts, **({} if monitor is None else {"monitor": monitor.facts()}), "weights": weights}

    def _close_stopped(self) -> None:
        closed, failed = close_stopped(self._root, self._live.unclosed)
        self._closed += closed
        self.errors += failed

    def _finish(self, done: Handover, status: str, fault: str | None) -> None:
        segment, lengths = done.segment, done.lengths if fault is None else None
        try:
            finish(
                segment.path,
                segment.writer,
                status,
                done.late,
                lengths=lengths,
                fault=fault,
                told=done.told,
                read=self._monitored,
            )
        finally:
            self._closed += 1
            self._last_closed = segment.path
            if self._causes is not None:
                self._causes.ask(segment.path)

    def _monitored(self, path: Path) -> dict[str, Any]:
        """What the manifest of a segment says of its monitor, once all of it was read."""
        monitor = self._live.monitor
        if monitor is None:
            return {}
        line = monitor.line(path.name)
        self._write_drift(line)
        return {"monitor": {**monitor.facts(), "drift_log": line}}

    def _write_drift(self, line: dict[str, Any] | None) -> None:
        """Append to the drift log; what the disk does not take is tried again, and holds up nothing else."""
        assert self._live.monitor is not None
        try:
            self._live.monitor.write_log(self._root, line)
        except OSError as e:
            self.errors += 1
            logger.error("sglang-probe could not write the drift log of %s: %s", self._root, e)

    def _publish(self) -> None:
        if self._metrics is not None:
            live = self._live
            self._metrics.publish(
                live.totals,
                waiting=live.segment.writer.waiting,
                write_errors=live.write_errors,
                stops=live.stops,
                monitor=None if live.monitor is None else live.monitor.status(),
                causes=None if self._causes is None else self._causes.tokens,
            )
