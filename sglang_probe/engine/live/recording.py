"""A live recording as the scheduler's thread sees it: a sink that only counts and hands over.

Everything that touches the disk or waits is done by the writer's thread and by the keeper (`keeper.py`), which opens
and closes segments, publishes metrics, and begins again after a stop. One lock orders commits and the change of
segments; it is held for microseconds.

A recording that stops (`Stops`) does not end: its segment is closed as `incomplete`, and as soon as another one can be
opened a new *epoch* begins in it. The scheduler thread follows at its next launch, with a recorder that knows nothing
of what was before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sglang_probe.engine.ledger.facts import Commit, ForwardPlan
from sglang_probe.engine.live import provenance
from sglang_probe.engine.live.answers import Answers
from sglang_probe.engine.live.closing import Stopped
from sglang_probe.engine.live.config import LiveConfig
from sglang_probe.engine.live.keeper import Keeper
from sglang_probe.engine.live.metrics import Metrics
from sglang_probe.engine.live.monitor import LiveMonitor
from sglang_probe.engine.live.names import Names
from sglang_probe.engine.live.open_segment import Handover, OpenSegment
from sglang_probe.engine.live.overflow import Overflow
from sglang_probe.engine.live.privacy import Redactor
from sglang_probe.engine.live.sink import Sink, rebase
from sglang_probe.engine.live.stops import DISK, Stops
from sglang_probe.engine.live.totals import Totals
from sglang_probe.engine.live.traced import PREFIX

_UPDATES = 100
"""Updates of the weights that a manifest lists."""


class LiveRecording:
    """Sink of the recorder of a live server.

    Args:
        root: the directory that holds the segments.
        facts: manifest fields that are the same for all segments.
        drops: whether facts are dropped when the queue is full; else `put` waits.
        metrics: Prometheus series to keep up to date.
        monitor: reads and judges what is served, on the writers' threads.
        answers: makes what keeps rows for the requests that asked for them, once the directory is this server's.
        tick: seconds between two looks of the keeper.

    Raises (on construction):
        RunDirectoryError: another server records there.
    """

    segment: OpenSegment
    """What is being written; the keeper's first one comes with its construction."""

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
        answers: Callable[[], Answers] | None = None,
        tick: float = 1.0,
    ) -> None:
        self.root = root
        self._config, self._facts, self._drops = config, facts, drops
        self.monitor = monitor
        self._order = 0
        """Commits that were handed to writers."""
        self.totals = Totals(config.recent, traces=config.traces)
        self.names = Names()
        self.stops = Stops()
        self.epoch = 1
        """Raised when the recording begins again after a stop."""
        self.weights: list[dict[str, Any]] = [{"number": 0, "how": "model_path"}]
        """What the engine's weights were, by the number of updates before."""
        self.unclosed: list[Stopped] = []
        """Segments whose recording stopped, for the keeper to close."""
        self._redactor = Redactor(config.privacy)
        self._overflow = Overflow()
        self._lock = threading.Lock()
        self._keeper = Keeper(self, root, config, facts, part_seconds=part_seconds, metrics=metrics, tick=tick)
        self.answers = None if answers is None else answers()
        self._keeper.start()

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
                self.segment.carried_in[rid] = list(at)
                self.segment.carried_told = False

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
            segment = self.segment
            self.totals.count(commit)
            self._redactor.apply(commit)
            if segment.row_base and commit.numbered:
                rebase(commit, segment.row_base)
            segment.lose(commit.lost)
            segment.commits += 1
            segment.requests += len(commit.requests)
            if self._drops and segment.full:
                self.totals.dropped(commit)
                self._overflow.absorb(commit)
                return
            late = self._overflow.release()
            for found in (commit,) if late is None else (late, commit):
                segment.writer.put(self._numbered(found))
                if self.answers is not None:
                    self.answers.take(found)

    def _numbered(self, commit: Commit) -> Commit:
        """The commit with its place in the order of all of them, which a monitor reads in."""
        if self.monitor is not None:
            commit.order = self._order
            self._order += 1
        return commit

    def _late(self) -> Commit | None:
        late = self._overflow.release()
        return None if late is None else self._numbered(late)

    def weights_changed(self, entry: Mapping[str, Any]) -> None:
        """The engine's weights were updated: another segment begins soon."""
        with self._lock:
            self.weights = [*self.weights[-_UPDATES:], dict(entry)]
        self._keeper.wake()

    def provenance(self, rid: str) -> list[provenance.Span] | None:
        """Spans of a request that is just finishing, by its name; None if it did not ask."""
        entry = self.totals.active.get(rid)
        if entry is None or entry.spans is None:
            return None
        current = self.totals.pending[0] if self.totals.pending else None
        return provenance.with_current(entry.spans, current, rid)

    def traced(self, rid: str, *, finishing: bool) -> dict[str, int | str] | None:
        """Attributes for the OpenTelemetry span of a request that is just ending, by its name; None: not known.

        Takes no lock: the span of a request that was dropped may end where Python collects it, in the middle of `put`.

        Args:
            finishing: it finishes with the result that is being processed; else it is dropped.
        """
        so_far = self.totals.traced(rid)
        if so_far is None:
            return None
        now = so_far.with_flight(list(self.totals.pending), rid, finishing=finishing)
        return {f"{PREFIX}.request": rid, f"{PREFIX}.segment": self.segment.path.name, **now.attributes()}

    # ---------------------------------------------------------------- any thread

    def ask_flush(self) -> int:
        """Have the current segment closed soon. Returns the number to wait for in `status()["flush"]["done"]`."""
        return self._keeper.ask_flush()

    def stop(self, fault: str, reason: str, epoch: int | None = None) -> None:
        """Nothing can be recorded for now.

        Args:
            reason: one of `stops.REASONS`.
            epoch: what has failed; if another one has begun since, that goes on.
        """
        with self._lock:
            if self._keeper.closing or self.stops.fault is not None or epoch not in (None, self.epoch):
                return
            self.stops.stop(fault, reason)
            if self.answers is not None:
                self.answers.forget()
            self.unclosed.append(Stopped(self.segment.path, self.segment.writer, fault, self._told()))
        self._keeper.wake()

    def status(self) -> dict[str, Any]:
        """Counts and state, as plain data."""
        t, segment = self.totals, self.segment
        return {
            **self.stops.state(),
            "dp_rank": self._facts.get("dp_rank", 0),
            "privacy": self._config.privacy,
            "segment": {
                "number": segment.number,
                "path": str(segment.path),
                "seconds": round(segment.seconds, 1),
                "requests": segment.requests,
                "megabytes": round(segment.megabytes, 3),
            },
            "weights": self.weights[-1],
            "requests": t.requests,
            "requests_in_flight": len(t.active),
            "requests_unaccounted": t.unaccounted,
            "forwards": t.forwards,
            "forwards_dropped": self._overflow.forwards,
            "rows": t.rows,
            "positions": dict(t.positions),
            "queue": {"waiting": segment.writer.waiting, "size": segment.room},
            "disk": None if (failing := segment.writer.failing) is None else str(failing),
            "write_errors": self.write_errors,
            **self._keeper.state(),
            **({} if self.monitor is None else {"monitor": self.monitor.alerts()}),
            "recent": t.recent(),
        }

    @property
    def write_errors(self) -> int:
        """Times that the disk failed, the writer's and the keeper's together."""
        return self._keeper.errors + self.stops.counts[DISK]

    def flush(self) -> None:
        """What the writer of a harvest does at its end: everything is on disk, and nothing more comes."""
        self.close()

    def close(self, *, status: str = "complete", fault: str | None = None, timeout: float = 20.0) -> None:
        """Close the current segment and end. Called once, when the server ends or has crashed."""
        self._keeper.close(status, fault, timeout)
        if self.answers is not None:
            self.answers.close()

    # ---------------------------------------------------------------- the keeper's thread

    def release_late(self) -> None:
        """Hand over what was dropped last, if there is room: no commit may follow that could take it along."""
        with self._lock:
            if self.segment.writer.error is None and not self.segment.full:
                late = self._late()
                if late is not None:
                    self.segment.writer.put(late)
                    if self.answers is not None:
                        self.answers.take(late)

    def go_on_in(self, segment: OpenSegment) -> Handover | None:
        """Further commits go into this segment. None, and nothing changes, if the recording has stopped meanwhile."""
        with self._lock:
            if self.stops.fault is not None:
                return None
            done = self._handover()
            segment.row_base = self.totals.rows
            segment.carried_in = dict(done.carried)
            self.segment = segment
            self.names.new_segment(done.carried)
            return done

    def begin_again_in(self, segment: OpenSegment) -> None:
        """A new epoch begins in this segment, which knows nothing of what was before."""
        with self._lock:
            self.totals.forget_in_flight()
            self._redactor.forget()
            dropped, self._overflow = self._overflow.forwards, Overflow()
            self._overflow.forwards = dropped
            if self.monitor is not None:
                self.monitor.forget(self._order)
            segment.row_base = self.totals.rows
            self.segment = segment
            self.names.forget()
            self.epoch += 1
            if self.answers is not None:
                self.answers.resume(self.epoch)
            self.stops.resume()

    def last(self) -> Handover:
        """What the last segment is closed with."""
        with self._lock:
            return self._handover()

    def _handover(self) -> Handover:
        lengths = {rid: entry.prompt_len for rid, entry in self.totals.active.items()}
        return Handover(self.segment, self._late(), lengths, self._told(), self.totals.carried())

    def _told(self) -> dict[str, Any]:
        """What the manifest of the current segment says at its end besides the counts."""
        return {
            "weights": self.weights,
            "unaccounted": dict(self.segment.lost),
            "carried_in": dict(self.segment.carried_in),
        }
