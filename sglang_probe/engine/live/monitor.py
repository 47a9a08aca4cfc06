"""Judges requests while they are served: on the writer's thread, by the code that judges recorded runs.

What is read of a row depends on the row alone, and is done as its commit is written. What is said of a request depends
on all requests that ended before it: commits carry their place in the order in which they were handed over, and are
judged in it, whichever segment's writer has them (at a change of segments there are two).

The ledger comes first: while much waits to be written, rows are shed, and requests that had one of them are not judged.

A fault here turns the monitor off and says so; the recording goes on. Requests under interventions of their own, and
rows that are computed again, are not read (`engine/hooks/instruments/monitor.py`), so that what one client asks of the
probe alarms nobody.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_probe.engine.ledger.facts import Commit, Watched
from sglang_probe.monitor.alarms import Judge, Verdict
from sglang_probe.monitor.profile import distances
from sglang_probe.run import schema

if TYPE_CHECKING:
    from sglang_probe.monitor.config import MonitorConfig
    from sglang_probe.monitor.reading import Reading
    from sglang_probe.monitor.stored import StoredProfile, Watch

Array = np.ndarray[Any, Any]
logger = logging.getLogger("sglang_probe")

DRIFT_LOG = "drift.jsonl"
"""In the directory of a live recording: a line for each closed segment, and one for each event."""

_RID = schema.ENGINE_REQUESTS.get_field_index("rid")
_FINISH = schema.ENGINE_REQUESTS.get_field_index("finish_reason")
_EVIDENCE = 20
"""Latest requests whose p-values an event has."""
_MOST_EVENTS = 100
"""Latest events that `GET /probe/alerts` lists; the drift log has all."""
_MOST_EARLY = 4096
"""Commits that wait for one before them: then that was lost with the writer that had it, and they are judged."""
_MOST_ROWS = 4096
"""Rows of a request that are kept until it is judged: of a longer one the first so many count."""


@dataclass(slots=True)
class _Trajectory:
    values: list[Array] = field(default_factory=list)
    far: list[Array] = field(default_factory=list)
    weight: list[Array] = field(default_factory=list)
    rows: int = 0
    judged: bool = False
    """Nothing more is read of it."""


@dataclass(slots=True)
class _Segment:
    """What the drift log says of one segment."""

    trajectories: int = 0
    alarms: int = 0
    level_S: Array | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0
    shed: int = 0
    not_finite: int = 0
    total_K: Array | None = None
    known_K: Array | None = None


class LiveMonitor:
    """The monitor of one engine process.

    Args:
        profile: None: rows are read and recorded, and nothing is judged.
        watch: what is read. reading: what reads it.
        model: what the manifest says of whose rows they are: `model`, `model_weight_hash`.
    """

    def __init__(
        self,
        config: MonitorConfig,
        watch: Watch,
        reading: Reading,
        profile: StoredProfile | None = None,
        model: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._config, self.watch, self._reading, self._profile = config, watch, reading, profile
        self._model = dict(model)
        self._judge: Judge | None = None
        if profile is not None:
            reference = profile.profile.reference.to_numpy(np.float64)
            self._judge = Judge(reference, share=config.share, rate=config.rate)
        self._lock = threading.Lock()
        self.off: str | None = None
        """Why nothing is read any more."""
        self.alarms = 0
        """Requests that were unusual."""
        self.requests = 0
        """Requests that were judged."""
        self.rows = 0
        """Rows that were read."""
        self.shed = 0
        """Rows that were not read, because the ledger would have waited for it."""
        self.not_finite = 0
        """Rows that were read and had a number that is not finite."""
        self.commits_lost = 0
        """Commits that did not come, and are not waited for any more."""
        self.cannot_alarm: str | None = None
        """Why no request can be found unusual, however unusual it is."""
        if self._judge is not None and not self._judge.can_alarm:
            self.cannot_alarm = (
                f"{self._judge.references} trajectories of the profile's reference and {self._judge.statistics} "
                f"statistics: the least p of a request is {self._judge.least:.3g}, above the share of {config.share:g}"
            )
            logger.warning("sglang-probe: the monitor can find no request unusual: %s", self.cannot_alarm)
        self._alerts: deque[dict[str, Any]] = deque(maxlen=config.recent)
        self._drifts: deque[dict[str, Any]] = deque(maxlen=_MOST_EVENTS)
        self._last: deque[dict[str, Any]] = deque(maxlen=_EVIDENCE)
        self._log: deque[dict[str, Any]] = deque()
        """Events that are not in the drift log's file yet."""
        self.forget(0)

    def forget(self, order: int) -> None:
        """What was handed over does not come any more; the next commit has this place."""
        with self._lock:
            self._next = order
            self._early: dict[int, tuple[str, Commit, Array | None, Array | None]] = {}
            self._open: dict[str, _Trajectory] = {}
            self._segments: dict[str, _Segment] = {}

    # ---------------------------------------------------------------- a writer's thread

    def read(self, commit: Commit, segment: str, *, late: bool = False) -> None:
        """Read the rows of a commit, and judge the requests that end with it. Does not raise.

        Args:
            late: there is no time for it: shed the rows.
        """
        if self.off is not None:
            commit.watched = None
            return
        try:
            self._read(commit, segment, late)
        except Exception as e:
            logger.exception("sglang-probe: the monitor stopped; the recording goes on")
            self.stop(f"it failed: {type(e).__name__}: {e}")
        finally:
            commit.watched = None

    def stop(self, why: str) -> None:
        """Read nothing any more."""
        if self.off is None:
            self.off = why
            self._event("off", evidence=why)

    def _read(self, commit: Commit, segment: str, late: bool) -> None:
        watched, values, far = commit.watched, None, None
        if watched is not None and not late and not watched.weights:
            values = self._reading.columns(watched.x_ND)
            if self._profile is not None and self._profile.profile.whitening is not None:
                far = distances(watched.x_ND, self._profile.profile.whitening)
            commit.monitored = _rows_of(watched, values)
        with self._lock:
            if commit.order < self._next:
                return  # of a recording that has stopped since
            rids = None if watched is None else replace(watched, x_ND=None)
            kept = Commit(requests=commit.requests, lost=commit.lost, watched=rids, order=commit.order)
            self._early[commit.order] = (segment, kept, values, far)
            if len(self._early) > _MOST_EARLY:
                lost, self._next = min(self._early) - self._next, min(self._early)
                self.commits_lost += lost
                self._event("gap", place=self.requests, evidence=f"{lost} commits were lost before they were read")
            while (found := self._early.pop(self._next, None)) is not None:
                self._next += 1
                self._follow(*found)

    def _follow(self, segment: str, commit: Commit, values: Array | None, far: Array | None) -> None:
        line = self._segments.setdefault(segment, _Segment())
        watched = commit.watched
        if watched is not None and watched.weights:
            self._weights_changed()
        elif watched is not None and values is None:
            self.shed += len(watched.rids)
            line.shed += len(watched.rids)
            for rid in watched.rids:  # a part of its rows would be compared with the whole of others
                self._open[rid] = _Trajectory(judged=True)
        elif watched is not None and values is not None:
            self.rows += len(values)
            line.rows += len(values)
            known = ~np.isnan(values)
            self._count_not_finite(watched, np.asarray(known.all(1)), line)
            total = np.where(known, values, 0).sum(0)
            line.total_K = total if line.total_K is None else line.total_K + total
            line.known_K = known.sum(0) if line.known_K is None else line.known_K + known.sum(0)
            for i, rid in enumerate(watched.rids):
                of = self._open.setdefault(rid, _Trajectory())
                if of.judged or of.rows >= (self.watch.rows or _MOST_ROWS):
                    continue
                of.rows += 1
                of.values.append(values[i])
                of.weight.append(1 / watched.probability_N[i])
                if far is not None:
                    of.far.append(far[i])
                if self.watch.rows is not None and of.rows == self.watch.rows:
                    self._judged(rid, of, line)
        for rid, _ in commit.lost:
            self._open.pop(rid, None)
        for request in commit.requests:
            found = self._open.pop(request[_RID], None)
            if found is None or found.judged or request[_FINISH] == schema.UNACCOUNTED or self.watch.rows is not None:
                continue
            self._judged(request[_RID], found, line)

    def _judged(self, rid: str, of: _Trajectory, line: _Segment) -> None:
        of.judged = True
        if self._judge is None or self._profile is None or self.off is not None:
            of.values, of.far, of.weight = [], [], []
            return
        profile = self._profile.profile
        weight = np.array(of.weight) if self.watch.sampling.entropy is not None else None
        scores = profile.score(np.array(of.values), np.array(of.far) if of.far else None, weight)
        of.values, of.far, of.weight = [], [], []
        verdict = self._judge.judge(scores)
        self.requests += 1
        line.trajectories += 1
        line.level_S = verdict.level_S if line.level_S is None else np.maximum(line.level_S, verdict.level_S)
        told = {"rid": rid, "place": verdict.place, **self._told(verdict), "rows": of.rows}
        self._last.append({"rid": rid, "p_S": verdict.p_S})
        if verdict.alarm:
            self.alarms += 1
            line.alarms += 1
            self._alerts.append({"alert": "request", "at": time.time(), **told})
        for s in np.flatnonzero(verdict.drifted_S):
            self._drift(int(s), verdict, line)

    def _told(self, verdict: Verdict) -> dict[str, Any]:
        assert self._profile is not None
        return {
            "statistic": self._profile.profile.statistics[verdict.statistic],
            "score": _number(verdict.score),
            "p": verdict.p,
        }

    def _drift(self, s: int, verdict: Verdict, line: _Segment) -> None:
        """A detector alarmed: an event, with what it rests on. Nothing is trained by it."""
        assert self._profile is not None
        evidence = {
            "detector": float(verdict.level_S[s]),
            "rate": self._config.rate,
            "requests": verdict.place + 1,
            "references": len(self._profile.profile.reference),
            "profile_sha256": self._profile.sha256,
            "last": [{"rid": x["rid"], "p": round(float(x["p_S"][s]), 6)} for x in self._last],
        }
        name = self._profile.profile.statistics[s]
        line.events.append(self._event("retrain", statistic=name, place=verdict.place, evidence=evidence))

    def _count_not_finite(self, watched: Watched, finite_N: Array, line: _Segment) -> None:
        """A number that is not finite is no evidence to a detector; the first row of a segment with one is an event."""
        found = int((~finite_N).sum())
        if found and not line.not_finite:
            evidence = {"rid": watched.rids[int(finite_N.argmin())], "of": self.watch.hook_point}
            line.events.append(self._event("not finite", place=self.requests, evidence=evidence))
        self.not_finite += found
        line.not_finite += found

    def _weights_changed(self) -> None:
        if self.off is not None:
            return
        of = "profile is" if self._judge is not None else "rows that were recorded are"
        why = f"the engine's weights were updated, and the {of} of those before"
        self._event("retrain", statistic=None, place=self.requests, evidence=why)
        self.stop(f"{why}: start the server again with the new ones")

    def _event(self, event: str, **fields: Any) -> dict[str, Any]:
        told = {"event": event, "at": time.time(), **fields}
        self._drifts.append(told)
        self._log.append(told)
        return told

    # ---------------------------------------------------------------- keeper, endpoints

    def line(self, segment: str) -> dict[str, Any]:
        """The line of the drift log of a segment whose writer has ended; it is told once."""
        with self._lock:
            of = self._segments.pop(segment, _Segment())
        told: dict[str, Any] = {"segment": segment, "rows": of.rows, "shed": of.shed, "not_finite": of.not_finite}
        told["off"] = self.off
        if of.total_K is not None and of.known_K is not None:
            mean = np.where(of.known_K > 0, of.total_K / np.maximum(of.known_K, 1), np.nan)
            told["means"] = {n: _number(x) for n, x in zip(self.watch.columns, mean, strict=True)}
        if self._judge is None or self._profile is None:
            return told
        told |= {
            "requests": of.trajectories,
            "alarms": of.alarms,
            "expected_at_most": self._config.share * of.trajectories,
            "events": of.events,
            "statistic": None,
            "detector": 0.0,
        }
        if of.level_S is not None:
            top = int(of.level_S.argmax())
            told |= {"statistic": self._profile.profile.statistics[top], "detector": float(of.level_S[top])}
        return {**told, "drift": told["detector"] >= 1}

    def write_log(self, root: Path, line: dict[str, Any] | None = None) -> None:
        """Append what is new to the drift log. What it does not take is written the next time.

        Raises:
            OSError: the disk does not take it.
        """
        if line is not None:
            self._log.append(line)
        told = [self._log[i] for i in range(len(self._log))]  # other threads append
        if not told:
            return
        data = "".join(json.dumps(x) + "\n" for x in told).encode()
        with (root / DRIFT_LOG).open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if file.write(data) != len(data):
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(root / DRIFT_LOG))
        for _ in told:
            self._log.popleft()

    def facts(self) -> dict[str, Any]:
        """For the manifest of a segment: what is read, and what judges it."""
        profile = None if self._profile is None else self._profile.sha256
        return {**self.watch.model_dump(mode="json"), **self._model, "profile_sha256": profile}

    def status(self) -> dict[str, Any]:
        """For `GET /probe/status` and `/metrics`: counts, and how far each detector is from its alarm."""
        found: dict[str, Any] = {
            "off": self.off,
            "rows": self.rows,
            "shed": self.shed,
            "not_finite": self.not_finite,
            "judging": self._judge is not None,
            "waiting": len(self._early),
            "commits_lost": self.commits_lost,
        }
        if (judge := self._judge) is None or self._profile is None:
            return found
        names = self._profile.profile.statistics
        since = {n: int(at) for n, at in zip(names, judge.since_S, strict=True) if at >= 0}
        highest = {n: float(x) for n, x in zip(names, judge.highest_S, strict=True)}
        return {
            **found,
            "requests": self.requests,
            "alarms": self.alarms,
            "drift": since,
            "highest": highest,
            "cannot_alarm": self.cannot_alarm,
        }

    def alerts(self) -> dict[str, Any]:
        """For `GET /probe/alerts`: requests that were unusual, latest first, and every event."""
        return {**self.status(), "share": self._config.share, "rate": self._config.rate, **self._listed()}

    def _listed(self) -> dict[str, Any]:
        for _ in range(3):  # appended to by another thread, without a lock that the scheduler would wait for
            try:
                return {"alerts": list(self._alerts)[::-1], "events": list(self._drifts)}
            except RuntimeError:
                continue
        return {"alerts": [], "events": []}


def _rows_of(watched: Watched, values: Array) -> list[tuple[Any, ...]]:
    n = len(watched.rids)
    entropy = [None] * n if watched.entropy_N is None else watched.entropy_N.tolist()
    forward = [watched.forward_id] * n
    columns = (watched.rids, watched.attempts, watched.positions, forward, watched.probability_N.tolist(), entropy)
    return list(zip(*columns, values.tolist(), strict=True))


def _number(x: float) -> float | None:
    """JSON has no NaN."""
    return float(x) if np.isfinite(x) else None
