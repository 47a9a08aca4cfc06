"""The segment that a live recording is writing now: its writer, and what was handed to it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_probe.engine.ledger.facts import Commit
from sglang_probe.engine.ledger.writer import Writer

_REASONS = 100
"""Requests of a segment of which the manifest says why they could not be accounted for."""


class OpenSegment:
    """What is true of one segment while it is open; another one has another object.

    Args:
        queue: commits that may wait for the writer before facts are dropped.
        min_seconds: age from which the segment may be closed on demand.
        row_base: rows that were captured before it.
        weights: number of the engine's weights at its opening.
    """

    def __init__(
        self, path: Path, number: int, writer: Writer, *, queue: int, min_seconds: float, row_base: int, weights: int
    ) -> None:
        self.path, self.number, self.writer = path, number, writer
        self.room = min(queue, writer.capacity - 2)  # two puts may follow, and must not block
        self.opened = time.monotonic()
        self.closable = self.opened + min_seconds
        self.due_since: float | None = None
        """Since when it is old or large enough to be closed, and waits for requests to end."""
        self.row_base, self.weights = row_base, weights
        self.commits = self.requests = 0
        self.carried_in: dict[str, list[int]] = {}
        """Requests that began in the segment before: `[attempt, position]`."""
        self.carried_told = True
        """Whether the manifest on disk says so."""
        self.lost: dict[str, str] = {}
        """Why requests could not be accounted for, by name."""

    @property
    def full(self) -> bool:
        """Whether another commit would have to wait for the writer."""
        return self.writer.error is None and (self.writer.waiting >= self.room or self.writer.half_full)

    @property
    def seconds(self) -> float:
        """Its age."""
        return time.monotonic() - self.opened

    @property
    def megabytes(self) -> float:
        """What was written to it."""
        return self.writer.bytes / 1e6

    def lose(self, lost: list[tuple[str, str]]) -> None:
        """Remember why requests could not be accounted for, as far as the manifest says it."""
        for rid, reason in lost[: max(_REASONS - len(self.lost), 0)]:
            self.lost[rid] = reason[:500]


@dataclass(frozen=True)
class Handover:
    """What a segment to which nothing more comes is closed with."""

    segment: OpenSegment
    late: Commit | None
    """The last facts."""
    lengths: dict[str, int]
    """Tokens of the prompts of the requests in flight."""
    told: dict[str, Any]
    """What its manifest says besides the counts."""
    carried: dict[str, list[int]]
    """Requests that go on in the next segment: `[attempt, position]`."""
