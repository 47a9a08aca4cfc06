"""Requests of one engine that wait or are in flight: at most so many at once, and answers as they come."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sglang_probe.errors import ProbeError

Asked = tuple[str, Sequence[int], dict[str, Any]]
"""A request to serve: rid, prompt, sampling parameters."""

LOOK_SECONDS = 0.5
"""Between two looks at whether the engine is alive and records."""


@dataclass(frozen=True)
class Answer:
    """One finished request as the engine reports it."""

    rid: str
    output_ids: list[int]
    cached_tokens: int


@dataclass(frozen=True)
class Refusal:
    """A request that SGLang did not serve."""

    rid: str
    message: str


class RequestRefused(ProbeError):
    """SGLang did not serve a request. The others go on."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(f"SGLang refuses request {refusal.rid}: {refusal.message}")
        self.refusal = refusal


class Generates(Protocol):
    """What is needed of an engine (`harvest/engine.py`)."""

    async def generate(self, rid: str, prompt_ids: Sequence[int], sampling_params: dict[str, Any]) -> Answer: ...

    def look(self) -> None: ...


class InFlight:
    """Requests are served in the order in which they are added, all on one event loop."""

    def __init__(self, engine: Generates) -> None:
        self._engine = engine
        self._waiting: deque[Asked] = deque()
        self._running: set[asyncio.Task[Answer]] = set()
        self._looked = time.monotonic()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, requests: Iterable[Asked]) -> None:
        """Serve these too, after those that wait."""
        self._waiting.extend(requests)

    async def answered(self, concurrency: int) -> list[Answer | Refusal]:
        """Wait until a request ended, or for `LOOK_SECONDS`.

        Raises:
            EngineDied: the engine ended. ProbeError: the recording stopped.
        """
        self._admit(concurrency)
        if self._running:
            done, self._running = await asyncio.wait(
                self._running, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
        else:
            done = set()
            await asyncio.sleep(LOOK_SECONDS)
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._engine.look()
            self._looked = time.monotonic()
        self._admit(concurrency)
        return [_outcome(task) for task in done]

    def cancel(self) -> None:
        """Nobody waits for the answers any more."""
        for task in self._running:
            task.cancel()

    def _admit(self, concurrency: int) -> None:
        while self._waiting and len(self._running) < concurrency:
            self._running.add(asyncio.ensure_future(self._engine.generate(*self._waiting.popleft())))


def _outcome(task: asyncio.Task[Answer]) -> Answer | Refusal:
    try:
        return task.result()
    except RequestRefused as e:
        return e.refusal
