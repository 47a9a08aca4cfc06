"""Rows of their own positions for the requests that asked for them (`Ask.rows`).

A thread of its own takes every commit in order and holds the last rows of everybody, up to a number of bytes, because
a request that reuses a position needs the row of another. When a request that asked ends, what it asked for is put
together and written as one safetensors file, from which the process that serves HTTP answers. Whatever is not held any
more is said to be missing, with the reason; nothing here waits for, or fails, a request or the recording.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_probe.engine.ledger.facts import Commit
from sglang_probe.rows_ask import RowsAsk, file_name
from sglang_probe.run import schema

if TYPE_CHECKING:
    import torch

    from sglang_probe.engine.live.config import AnswersConfig

logger = logging.getLogger("sglang_probe")

GONE = ".gone"
SUFFIX = ".safetensors"
_AT = {name: schema.SPANS.get_field_index(name) for name in schema.SPANS.names}
_FORWARD_ROW = schema.FORWARDS.get_field_index("row_start")
_RID, _PROMPT, _OUTPUT, _FINISH = (
    schema.ENGINE_REQUESTS.get_field_index(n) for n in ("rid", "prompt_len", "output_len", "finish_reason")
)
_PIECE_BYTES = 300
"""What it costs to know whose some rows are."""

_BUNDLE = 64
_LOOK = 1.0
"""Seconds after which the thread looks for what has expired."""

_GONE_SECONDS = 3600.0

NO_LONGER = "its row is no longer kept in memory"
BEFORE = "reused from an entry that was computed before the recording"
UNSELECTED = "its row is not recorded at this hook point"
NOT_COMPUTED = "it was not computed"
UNACCOUNTED = "the request could not be accounted for"


@dataclass(slots=True, eq=False)
class _Chunk:
    """Rows of one commit."""

    rows: dict[str, torch.Tensor]
    selected: Mapping[str, Any]
    nbytes: int
    rids: list[str]
    """A name for each piece of a request that lies in it."""


@dataclass(slots=True)
class _Piece:
    """Consecutive positions of one attempt whose rows lie one after another in a chunk."""

    attempt: int
    start: int
    end: int
    chunk: _Chunk
    offset: int


@dataclass(slots=True)
class _Asked:
    ask: RowsAsk
    began: float
    spans: list[tuple[Any, ...]] = field(default_factory=list)


class Answers:
    """Keeps rows, and writes what was asked for into `folder`, which only this user can read.

    Args:
        hook_points: what is recorded: `ask.hook_points` where a request names none.
    """

    def __init__(self, folder: Path, config: AnswersConfig, hook_points: list[str]) -> None:
        self._folder, self._config, self._hook_points = folder, config, hook_points
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        self._asked: dict[str, _Asked] = {}
        self._pieces: dict[str, deque[_Piece]] = {}
        self._chunks: deque[_Chunk] = deque()
        self._held = 0
        self._work = threading.Condition()
        self._waiting: deque[Commit | None] = deque()
        self._waiting_bytes = 0
        self._closing = False
        self.written = self.late = self.failed = 0
        self._thread = threading.Thread(target=self._run, name="sglang-probe-answers", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- scheduler thread

    def ask(self, name: str, ask: RowsAsk) -> None:
        """A request was launched that wants rows; `name` is its name in the ledger."""
        if name not in self._asked:
            self._asked[name] = _Asked(ask, time.time())

    def take(self, commit: Commit) -> None:
        """A commit was recorded. What comes faster than it can be held is not held."""
        nbytes = _nbytes(commit)
        with self._work:
            if nbytes and self._waiting_bytes + nbytes > self._config.memory:
                self.late += 1
                commit = Commit(forward=commit.forward, spans=commit.spans, requests=commit.requests)
                nbytes = 0
            self._waiting.append(commit)
            self._waiting_bytes += nbytes
            if len(self._waiting) >= _BUNDLE or any(r[_RID] in self._asked for r in commit.requests):
                self._work.notify()

    def forget(self) -> None:
        """The recording has stopped: what was in flight is not followed any more."""
        with self._work:
            self._waiting.append(None)

    def status(self) -> dict[str, Any]:
        """For `GET /probe/status`."""
        told = {"waiting": len(self._asked), "written": self.written, "failed": self.failed, "late": self.late}
        return {**told, "rows_kept_megabytes": round(self._held / 1e6, 3)}

    def close(self, timeout: float = 5.0) -> None:
        """End the thread; what was written can be fetched until it expires or the next server starts."""
        with self._work:
            self._closing = True
            self._work.notify()
        self._thread.join(timeout)

    # ---------------------------------------------------------------- its own thread

    def _run(self) -> None:
        looked = time.monotonic()
        while True:
            with self._work:
                self._work.wait_for(lambda: self._closing or self._due(), timeout=_LOOK)
                taken, self._waiting = self._waiting, deque()
                closing = self._closing
            while taken:
                commit = taken.popleft()
                try:
                    self._read(commit)
                except Exception:
                    self.failed += 1
                    logger.exception("sglang-probe could not keep rows for the requests that asked for them")
                with self._work:
                    self._waiting_bytes -= _nbytes(commit)
            if closing:
                return
            if time.monotonic() - looked >= _LOOK:
                looked = time.monotonic()
                with contextlib.suppress(OSError):
                    expire(self._folder, self._config)

    def _due(self) -> bool:
        return len(self._waiting) >= _BUNDLE or any(
            c is not None and any(r[_RID] in self._asked for r in c.requests) for c in self._waiting
        )

    def _read(self, commit: Commit | None) -> None:
        if commit is None:
            for known in (self._asked, self._pieces, self._chunks):
                known.clear()
            self._held = 0
            return
        self._hold(commit)
        for span in commit.spans:
            if (asked := self._asked.get(span[0])) is not None:
                asked.spans.append(span)
        for request in commit.requests:
            if (asked := self._asked.pop(request[_RID], None)) is not None:
                self._answer(request, asked)

    def _hold(self, commit: Commit) -> None:
        if not commit.rows or commit.forward is None:
            return
        first = commit.forward[_FORWARD_ROW]
        # Copies: on an accelerator the tensors lie in the ring of pinned memory that the next forwards need.
        rows = {h: x.clone() for h, x in commit.rows.items()}
        chunk = _Chunk(rows, commit.selected, sum(x.nbytes for x in rows.values()), [])
        for span in commit.spans:
            if span[_AT["status"]] == schema.COMPUTED and span[_AT["row_start"]] >= 0:
                rid, attempt, start, end = span[:4]
                piece = _Piece(attempt, start, end, chunk, span[_AT["row_start"]] - first)
                self._pieces.setdefault(rid, deque()).append(piece)
                chunk.rids.append(rid)
        chunk.nbytes += _PIECE_BYTES * len(chunk.rids)
        self._chunks.append(chunk)
        self._held += chunk.nbytes
        while self._held > self._config.memory and self._chunks:
            gone = self._chunks.popleft()
            self._held -= gone.nbytes
            for rid in gone.rids:  # pieces of a request lie in the order of the chunks
                pieces = self._pieces[rid]
                pieces.popleft()
                if not pieces:
                    del self._pieces[rid]

    def _answer(self, request: tuple[Any, ...], asked: _Asked) -> None:
        from safetensors.torch import save_file

        made = self._folder / file_name(asked.ask.handle)
        place = made.with_suffix(SUFFIX)
        if place.exists() or made.with_suffix(GONE).exists():
            return  # a handle is used once: a second request with it, or a second sample, adds nothing
        tensors, told = put_together(request, asked.ask, asked.spans, self._pieces, self._hook_points)
        partial = made.with_suffix(".partial")
        try:
            save_file(tensors, partial, metadata={"probe": json.dumps(told)})
            expire(self._folder, self._config, room=partial.stat().st_size)
            os.replace(partial, place)
        finally:
            partial.unlink(missing_ok=True)
        self.written += 1


def _nbytes(commit: Commit | None) -> int:
    return 0 if commit is None else sum(x.nbytes for x in (commit.rows or {}).values())


def put_together(
    request: tuple[Any, ...],
    ask: RowsAsk,
    spans: list[tuple[Any, ...]],
    held: Mapping[str, Any],
    hook_points: list[str],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of an answer and what is said of them.

    Tensors: `position` int64 `[n]`, ascending; of every hook point its rows `[n, width]`, NaN where there is none; and
    `<hook point>/has_row`, uint8 `[n]`. A hook point of which no row is held has the second alone.
    """
    import torch

    points = list(ask.hook_points or hook_points)
    length = request[_PROMPT] + max(request[_OUTPUT] - 1, 0)
    wanted = ask.positions(length)
    last = max((s[_AT["attempt"]] for s in spans), default=0)
    lost = request[_FINISH] == schema.UNACCOUNTED
    spans = [s for s in spans if s[_AT["attempt"]] == last and s[_AT["phase"]] != schema.OVERSHOOT]
    out: dict[str, torch.Tensor] = {}
    has = {point: np.zeros(len(wanted), dtype=bool) for point in points}
    why = np.full(len(wanted), UNACCOUNTED if lost else NOT_COMPUTED, dtype=object)
    for span in [] if lost else spans:
        owner, attempt = span[0], span[_AT["attempt"]]
        start, end, status = span[_AT["start"]], span[_AT["end"]], span[_AT["status"]]
        inside = slice(*np.searchsorted(wanted, (start, end)).tolist())
        if status == schema.REUSED:
            owner, attempt = span[_AT["origin_rid"]], span[_AT["origin_attempt"]]
            why[inside] = BEFORE if owner is None else NO_LONGER
        elif status == schema.COMPUTED:
            why[inside] = NO_LONGER
        else:
            continue
        for piece in held.get(owner, ()) if owner is not None else ():
            a, b = max(piece.start, start), min(piece.end, end)
            if piece.attempt == attempt and a < b:
                at = slice(*np.searchsorted(wanted, (a, b)).tolist())
                place = wanted[at] - piece.start + piece.offset
                why[at] = UNSELECTED
                for point in points:
                    _copy(piece.chunk, point, at, place, out, has[point])
    told = {
        "rid": request[_RID],
        "prompt_len": request[_PROMPT],
        "finish_reason": request[_FINISH],
        "hook_points": points,
        "spans": [_told(s) for s in spans],
        "missing": {p: _counts(why[~has[p]]) for p in points if not has[p].all()},
    }
    marks = {f"{p}/has_row": torch.from_numpy(x.astype(np.uint8)) for p, x in has.items()}
    return {"position": torch.from_numpy(wanted), **out, **marks}, told


def _copy(chunk: _Chunk, point: str, at: slice, place: Any, out: dict[str, torch.Tensor], has: Any) -> None:
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


def _told(span: tuple[Any, ...]) -> dict[str, Any]:
    names = ("start", "end", "status", "phase", "intervention")
    return {**{n: span[_AT[n]] for n in names}, "origin": span[_AT["origin_rid"]]}


def _counts(reasons: Any) -> dict[str, int]:
    names, counts = np.unique(reasons.astype(str), return_counts=True)
    return {str(n): int(c) for n, c in zip(names, counts, strict=True)}


def expire(folder: Path, config: AnswersConfig, room: int = 0) -> None:
    """Take away what is too old, and the oldest until there are `room` bytes for another; a mark of each stays for an
    hour, so that whoever comes for it is told."""
    now = time.time()
    found = sorted((p.stat().st_mtime, p.stat().st_size, p) for p in folder.glob(f"*{SUFFIX}"))
    total = sum(size for _, size, _ in found) + room
    for written, size, path in found:
        if now - written <= config.seconds and total <= config.megabytes * 1e6:
            break
        path.with_suffix(GONE).touch()
        path.unlink(missing_ok=True)
        total -= size
    for mark in folder.glob(f"*{GONE}"):
        if now - mark.stat().st_mtime > _GONE_SECONDS:
            mark.unlink(missing_ok=True)
