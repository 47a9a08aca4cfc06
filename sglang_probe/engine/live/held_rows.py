"""The last rows of everybody, in memory: a request that reuses a position needs the row of whoever computed it.

A name may be given again (`live/names.py`). So rows are held by request and not by name: the first span of a request,
which begins at position 0 of its attempt 0, begins a new entry, and whoever has reused positions of the earlier request
keeps that one's `Line`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_probe.engine.ledger.facts import Commit
from sglang_probe.run import schema

if TYPE_CHECKING:
    import torch

_AT = {name: schema.SPANS.get_field_index(name) for name in schema.SPANS.names}
_FORWARD_ROW = schema.FORWARDS.get_field_index("row_start")
_PIECE_BYTES = 400
"""What it costs to know whose some rows are."""

_COMPACT = 64


@dataclass(slots=True, eq=False)
class Chunk:
    """Rows of one commit."""

    rows: dict[str, torch.Tensor]
    selected: Mapping[str, Any]
    nbytes: int
    lines: list[tuple[str, int, Line]]
    """Request, attempt and line of each piece that lies in it."""


@dataclass(slots=True)
class Piece:
    """Consecutive positions of one attempt whose rows lie one after another in a chunk."""

    start: int
    end: int
    chunk: Chunk
    offset: int


class Line:
    """What is held of one attempt of one request, by position."""

    __slots__ = ("_gone", "_pieces", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._pieces: list[Piece | None] = []
        self._gone = 0

    def __len__(self) -> int:
        return len(self._pieces) - self._gone

    def add(self, piece: Piece) -> None:
        """Of positions after all those that are held."""
        self._starts.append(piece.start)
        self._pieces.append(piece)

    def drop_first(self) -> None:
        """The first piece is held no longer."""
        self._pieces[self._gone] = None
        self._gone += 1
        if self._gone >= _COMPACT and 2 * self._gone >= len(self._pieces):
            del self._starts[: self._gone], self._pieces[: self._gone]
            self._gone = 0

    def between(self, start: int, end: int) -> list[Piece]:
        """Pieces that have a position of `[start, end)`."""
        first = max(bisect_right(self._starts, start) - 1, self._gone)
        found = self._pieces[first : bisect_left(self._starts, end)]
        return [p for p in found if p is not None and p.end > start]


class HeldRows:
    """Rows of the last commits, up to `memory` bytes."""

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._requests: dict[str, dict[int, Line]] = {}
        self._chunks: deque[Chunk] = deque()
        self.nbytes = 0

    def origin(self, span: tuple[Any, ...]) -> Line | None:
        """Where the rows of a reused span are, if any is held. To be asked before the commit of the span is taken."""
        return self._requests.get(span[_AT["origin_rid"]], {}).get(span[_AT["origin_attempt"]])

    def own(self, span: tuple[Any, ...]) -> Line | None:
        """Where the rows of a computed span are. To be asked after its commit was taken."""
        return self._requests.get(span[0], {}).get(span[1])

    def clear(self) -> None:
        """Nothing is held any more."""
        self._requests.clear()
        self._chunks.clear()
        self.nbytes = 0

    def take(self, commit: Commit) -> None:
        """Hold what a commit has; the oldest go."""
        for span in commit.spans:
            if span[1] == 0 and span[2] == 0:
                self._requests.pop(span[0], None)
        if not commit.rows or commit.forward is None:
            return
        first = commit.forward[_FORWARD_ROW]
        # Copies: on an accelerator the tensors lie in the ring of pinned memory that the next forwards need.
        rows = {h: x.clone() for h, x in commit.rows.items()}
        chunk = Chunk(rows, commit.selected, sum(x.nbytes for x in rows.values()), [])
        for span in commit.spans:
            (rid, attempt, start, end), row = span[:4], span[_AT["row_start"]]
            if span[_AT["status"]] == schema.COMPUTED and row >= 0 and span[_AT["phase"]] != schema.OVERSHOOT:
                line = self._requests.setdefault(rid, {}).setdefault(attempt, Line())
                line.add(Piece(start, end, chunk, row - first))
                chunk.lines.append((rid, attempt, line))
        chunk.nbytes += _PIECE_BYTES * len(chunk.lines)
        self._chunks.append(chunk)
        self.nbytes += chunk.nbytes
        while self.nbytes > self._memory and self._chunks:
            self._drop(self._chunks.popleft())

    def _drop(self, chunk: Chunk) -> None:
        self.nbytes -= chunk.nbytes
        for rid, attempt, line in chunk.lines:  # pieces of a line lie in the order of the chunks
            line.drop_first()
            attempts = self._requests.get(rid)
            if not len(line) and attempts is not None and attempts.get(attempt) is line:
                del attempts[attempt]
                if not attempts:
                    del self._requests[rid]
