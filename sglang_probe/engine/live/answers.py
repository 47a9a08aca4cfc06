"""Rows of their own positions for the requests that asked for them (`Ask.rows`).

A thread of its own takes every commit in order and holds the last rows of everybody, up to a number of bytes
(`held_rows.py`). When a request that asked ends, what it asked for is put together and written as one safetensors file
(`answer_files.py`), from which the process that serves HTTP answers. Whatever is not held any more is said to be
missing, with the reason; nothing here waits for, or fails, a request or the recording.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_probe.engine.ledger.facts import Commit
from sglang_probe.engine.live.answer_files import FULL, LATE, STOPPED, AnswerFiles
from sglang_probe.engine.live.held_rows import Chunk, HeldRows, Line
from sglang_probe.rows_ask import RowsAsk, file_name
from sglang_probe.run import schema

if TYPE_CHECKING:
    import torch

    from sglang_probe.engine.live.config import AnswersConfig

logger = logging.getLogger("sglang_probe")

_AT = {name: schema.SPANS.get_field_index(name) for name in schema.SPANS.names}
_RID, _PROMPT, _OUTPUT, _FINISH = (
    schema.ENGINE_REQUESTS.get_field_index(n) for n in ("rid", "prompt_len", "output_len", "finish_reason")
)
_BUNDLE = 64
_LOOK = 1.0
"""Seconds after which the thread looks for what has expired."""

_MOST_WAITING = 8192
"""Commits that may wait for the thread. One more, and nothing of them is kept."""

_MOST_ASKED = 4096
"""Requests in flight that may have asked."""

_ENTRY_BYTES = 256
"""Of a tensor in the header of a file, about."""

NO_LONGER = "its row is no longer kept in memory"
BEFORE = "reused from an entry that was computed before the recording"
UNSELECTED = "its row is not recorded at this hook point"
NOT_COMPUTED = "it was not computed"
UNRECORDED = "the recording dropped it, because the disk was too slow"
UNACCOUNTED = "the request could not be accounted for"

Span = tuple[Any, ...]


@dataclass(slots=True, eq=False)
class _Asked:
    ask: RowsAsk
    spans: list[tuple[Span, Line | None]] = field(default_factory=list)
    """Each with where its rows are."""


@dataclass(slots=True)
class _Work:
    """What the thread is handed: a commit with what concerns those who asked, or (None) the end of a recording."""

    commit: Commit | None
    nbytes: int = 0
    spans: list[tuple[_Asked, Span]] = field(default_factory=list)
    ended: list[tuple[tuple[Any, ...], _Asked]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    """Handles under which nothing will be, and why."""


class Answers:
    """Keeps rows, and writes what was asked for into `folder`, which only this user can read. `start` begins.

    Args:
        hook_points: what is recorded: `ask.hook_points` where a request names none.

    Raises:
        RunDirectoryError: another server keeps rows there.
    """

    def __init__(self, folder: Path, config: AnswersConfig, hook_points: list[str]) -> None:
        self._config, self._hook_points = config, hook_points
        self._files = AnswerFiles(folder, config)
        self._held = HeldRows(config.memory)
        self._asked: dict[str, _Asked] = {}
        self._epoch: int | None = 1
        self._work = threading.Condition()
        self._waiting: deque[_Work] = deque()
        self._waiting_bytes = 0
        self._closing = False
        self.written = self.late = self.failed = self.refused = 0
        self._thread = threading.Thread(target=self._run, name="sglang-probe-answers", daemon=True)

    def start(self) -> Answers:
        """Begin to take commits."""
        self._thread.start()
        return self

    # ---------------------------------------------------------------- scheduler thread

    def ask(self, name: str, ask: RowsAsk, epoch: int = 1) -> None:
        """A request was launched that wants rows; `name` is its name in the ledger of this epoch of the recording."""
        with self._work:
            known = self._asked.get(name)
            if known is not None and known.ask.handle == ask.handle:
                return
            if epoch != self._epoch:
                self._refuse([(ask.handle, STOPPED)])
            elif known is None and len(self._asked) >= _MOST_ASKED:
                self._refuse([(ask.handle, FULL)])
            else:  # who had the name before is no more: a name in flight is of one request
                self._asked[name] = _Asked(ask)

    def unrecorded(self, ask: RowsAsk) -> None:
        """A request that wants rows has come. Nothing is recorded at present: whoever fetches is told."""
        with self._work:
            self._refuse([(ask.handle, STOPPED)])

    def take(self, commit: Commit) -> None:
        """A commit was recorded. What comes faster than it can be held is not held."""
        work = _Work(commit, _nbytes(commit))
        with self._work:
            if self._asked:
                asked = self._asked
                work.spans = [(a, s) for s in commit.spans if (a := asked.get(s[0])) is not None]
                work.ended = [(r, a) for r in commit.requests if (a := asked.pop(r[_RID], None)) is not None]
            if work.nbytes and self._waiting_bytes + work.nbytes > self._config.memory:
                self.late += 1
                work.commit = Commit(forward=commit.forward, spans=commit.spans, requests=commit.requests)
                work.nbytes = 0
            self._put(work)
            if work.ended or len(self._waiting) >= _BUNDLE:
                self._work.notify()

    def status(self) -> dict[str, Any]:
        """For `GET /probe/status`."""
        told = {"waiting": len(self._asked), "written": self.written, "failed": self.failed, "late": self.late}
        return {**told, "refused": self.refused, "rows_kept_megabytes": round(self._held.nbytes / 1e6, 3)}

    # ---------------------------------------------------------------- any thread

    def forget(self) -> None:
        """The recording has stopped: what was in flight is not followed any more, and whoever asked is told so."""
        with self._work:
            self._epoch = None
            told = [(a.ask.handle, STOPPED) for a in self._asked.values()]
            self._asked.clear()
            self._put(_Work(None, refused=told))

    def resume(self, epoch: int) -> None:
        """The recording has begun again."""
        with self._work:
            self._epoch = epoch

    def close(self, timeout: float = 5.0) -> None:
        """End the thread; nothing can be fetched any more."""
        self._end_thread(timeout)
        self._files.close()

    def _end_thread(self, timeout: float) -> None:
        with self._work:
            self._closing = True
            self._work.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _refuse(self, told: list[tuple[str, str]]) -> None:
        """Under the lock: these handles are not answered."""
        if self._waiting and len(self._waiting[-1].refused) < _MOST_ASKED:
            self._waiting[-1].refused += told
        else:
            self._put(_Work(Commit(), refused=told))

    def _put(self, work: _Work) -> None:
        """Under the lock. If too much waits, all of it is given up, and nobody who asked is answered."""
        if len(self._waiting) >= _MOST_WAITING:
            lost = [*self._asked.values(), *(a for w in (*self._waiting, work) for _, a in w.ended)]
            told = [(a.ask.handle, LATE) for a in lost] + [r for w in (*self._waiting, work) for r in w.refused]
            self._waiting_bytes -= sum(w.nbytes for w in self._waiting)
            self._waiting.clear()
            self._asked.clear()
            self.late += 1
            work = _Work(None, refused=told[-_MOST_ASKED:])
        self._waiting.append(work)
        self._waiting_bytes += work.nbytes

    # ---------------------------------------------------------------- its own thread

    def _run(self) -> None:
        looked = time.monotonic()
        while True:
            with self._work:
                self._work.wait_for(lambda: self._closing or self._due(), timeout=_LOOK)
                closing = self._closing
            self._turn()
            if closing:
                return
            if time.monotonic() - looked >= _LOOK:
                looked = time.monotonic()
                try:
                    self._files.expire()
                except OSError as e:
                    logger.warning("sglang-probe could not remove rows that have expired: %s", e)

    def _due(self) -> bool:
        return len(self._waiting) >= _BUNDLE or any(w.ended or w.refused for w in self._waiting)

    def _turn(self) -> None:
        """Read what waits."""
        with self._work:
            taken, self._waiting = self._waiting, deque()
        while taken:
            work = taken.popleft()
            try:
                self._read(work)
            except Exception:
                self.failed += 1
                logger.exception("sglang-probe could not keep rows for the requests that asked for them")
            with self._work:
                self._waiting_bytes -= work.nbytes

    def _read(self, work: _Work) -> None:
        if work.commit is None:
            self._held.clear()
        else:
            reused = [self._held.origin(s) if s[_AT["status"]] == schema.REUSED else None for _, s in work.spans]
            self._held.take(work.commit)
            for (asked, span), line in zip(work.spans, reused, strict=True):
                own = self._held.own(span) if span[_AT["status"]] == schema.COMPUTED else None
                asked.spans.append((span, line or own))
        for handle, why in work.refused:
            if not self._files.used(name := file_name(handle)):
                self._files.mark(name, why)
                self.refused += 1
        for request, asked in work.ended:
            self._answer(request, asked)

    def _answer(self, request: tuple[Any, ...], asked: _Asked) -> None:
        from safetensors.torch import save_file

        name = file_name(asked.ask.handle)
        if self._files.used(name):
            return  # a handle is used once: a second request with it, or a second sample, adds nothing
        tensors, told = put_together(request, asked.ask, asked.spans, self._hook_points)
        said = json.dumps(told)
        size = len(said) + sum(x.nbytes + _ENTRY_BYTES for x in tensors.values())
        if self._files.add(name, size, lambda path: save_file(tensors, path, metadata={"probe": said})):
            self.written += 1
        else:
            self.refused += 1


def _nbytes(commit: Commit) -> int:
    return sum(x.nbytes for x in (commit.rows or {}).values())


def put_together(
    request: tuple[Any, ...], ask: RowsAsk, spans: list[tuple[Span, Line | None]], hook_points: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of an answer and what is said of them.

    Args:
        spans: of the request, each with where its rows are held.

    Tensors: `position` int64 `[n]`, ascending; of every hook point its rows `[n, width]`, NaN where there is none; and
    `<hook point>/has_row`, uint8 `[n]`. A hook point of which no row is held has the second alone.
    """
    import torch

    points = list(ask.hook_points or hook_points)
    length = request[_PROMPT] + max(request[_OUTPUT] - 1, 0)
    wanted = ask.positions(length)
    last = max((s[_AT["attempt"]] for s, _ in spans), default=0)
    lost = request[_FINISH] == schema.UNACCOUNTED
    spans = [(s, x) for s, x in spans if s[_AT["attempt"]] == last and s[_AT["phase"]] != schema.OVERSHOOT]
    out: dict[str, torch.Tensor] = {}
    has = {point: np.zeros(len(wanted), dtype=bool) for point in points}
    why = np.full(len(wanted), UNACCOUNTED if lost else NOT_COMPUTED, dtype=object)
    for inside, span, line in [] if lost else _inside(wanted, spans):
        start, end = span[_AT["start"]], span[_AT["end"]]
        if (reason := _without_row(span)) is not None:
            why[inside] = reason
        for piece in () if line is None else line.between(start, end):
            a, b = max(piece.start, start), min(piece.end, end)
            at = slice(*np.searchsorted(wanted, (a, b)).tolist())
            if at.start == at.stop:
                continue
            place = wanted[at] - piece.start + piece.offset
            why[at] = UNSELECTED
            for point in points:
                _copy(piece.chunk, point, at, place, out, has[point])
    told = {
        "rid": request[_RID],
        "prompt_len": request[_PROMPT],
        "finish_reason": request[_FINISH],
        "hook_points": points,
        "spans": _told([s for s, _ in spans]),
        "missing": {p: _counts(why[~has[p]]) for p in points if not has[p].all()},
    }
    marks = {f"{p}/has_row": torch.from_numpy(x.astype(np.uint8)) for p, x in has.items()}
    return {"position": torch.from_numpy(wanted), **out, **marks}, told


def _inside(wanted: Any, spans: list[tuple[Span, Line | None]]) -> Iterator[tuple[slice, Span, Line | None]]:
    """Spans that have a wanted position, each with which these are."""
    firsts = np.searchsorted(wanted, [s[_AT["start"]] for s, _ in spans])
    ends = np.searchsorted(wanted, [s[_AT["end"]] for s, _ in spans])
    for i in np.flatnonzero(firsts < ends).tolist():
        yield slice(int(firsts[i]), int(ends[i])), *spans[i]


def _without_row(span: Span) -> str | None:
    """Why a position of this span has no row, if none is held. None: as where there is no span."""
    status = span[_AT["status"]]
    if status == schema.REUSED:
        return BEFORE if span[_AT["origin_rid"]] is None else NO_LONGER
    return {schema.COMPUTED: NO_LONGER, schema.DROPPED: UNRECORDED}.get(status)


def _copy(chunk: Chunk, point: str, at: slice, place: Any, out: dict[str, torch.Tensor], has: Any) -> None:
    import torch

    if (rows := chunk.rows.get(point)) is None:
        return
    numbers = np.arange(at.start, at.stop)
    if (selected := chunk.selected.get(point)) is not None:
        found = np.minimum(np.searchsorted(selected, place), len(selected) - 1)
        here = selected[found] == place
        numbers, place = numbers[here], found[here]
    if point not in out:
        out[point] = torch.full((len(has), rows.shape[1]), float("nan"), dtype=rows.dtype)
    out[point][torch.from_numpy(numbers)] = rows[torch.from_numpy(place)]
    has[numbers] = True


def _told(spans: list[Span]) -> list[dict[str, Any]]:
    """What a client is told: neighbours of one fate as one, and no other request's id, with which SGLang would let it
    abort that request."""
    names = ("start", "end", "status", "phase", "intervention")
    told: list[dict[str, Any]] = []
    for span in spans:
        new = {n: span[_AT[n]] for n in names}
        before = told[-1] if told else {}
        if before.get("end") == new["start"] and all(before[n] == new[n] for n in names[2:]):
            before["end"] = new["end"]
        else:
            told.append(new)
    return told


def _counts(reasons: Any) -> dict[str, int]:
    names, counts = np.unique(reasons.astype(str), return_counts=True)
    return {str(n): int(c) for n, c in zip(names, counts, strict=True)}
