"""Requests of one engine that wait or are in flight: at most so many at once, and answers as they come."""

from __future__ import annotations

import asyncio
import functools
import heapq
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sglang_probe.errors import ProbeError
from sglang_probe.workload.request import asked_rid

Asked = tuple[str, Sequence[int], dict[str, Any]]
"""A request to serve: rid, prompt, sampling parameters."""

LOOK_SECONDS = 0.5
"""Between two looks at whether the engine is alive and records."""


@dataclass(frozen=True)
class Turn:
    """When a request is sent."""

    number: int
    """Before all of a higher number that could be sent too."""
    after: str | None = None
    """Not before this one, by its own id, was answered by the same engine, if that engine has it."""
    begun: bool = False
    """Its first token is enough: its prompt is in the prefix cache then."""


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

    async def generate(
        self,
        rid: str,
        prompt_ids: Sequence[int],
        sampling_params: dict[str, Any],
        begun: Callable[[], None] | None = None,
    ) -> Answer: ...

    def look(self) -> None: ...


class InFlight:
    """Requests are served in the order in which they are added, unless they have a `Turn`; all on one event loop."""

    def __init__(self, engine: Generates) -> None:
        self._engine = engine
        self._waiting: list[tuple[int, int, Asked]] = []
        """A heap of what can be sent: number of its turn, how many were added before it, request."""
        self._followers: dict[str, list[tuple[int, int, Asked]]] = {}
        """By the own id of a request that was not answered: those that wait for it."""
        self._watched: set[str] = set()
        """Own ids of those of which a first token is waited for."""
        self._running: dict[asyncio.Task[Answer], str] = {}
        self._added = 0
        self._left = 0
        self._looked = time.monotonic()

    def __len__(self) -> int:
        return self._left

    @property
    def ready(self) -> int:
        """Requests that are in flight, or could be."""
        return len(self._waiting) + len(self._running)

    def add(self, requests: Iterable[Asked], turns: Mapping[str, Turn] | None = None) -> None:
        """Serve these too, after those that wait.

        Args:
            turns: by a request's own id; those that have one are sent by it.
        """
        for request in requests:
            name = asked_rid(request[0])
            turn = (turns or {}).get(name, Turn(0))
            entry = (turn.number, self._added, request)
            self._added, self._left = self._added + 1, self._left + 1
            self._followers[name] = []
            if turn.after in self._followers:
                self._followers[turn.after].append(entry)
                if turn.begun:
                    self._watched.add(turn.after)
            else:
                heapq.heappush(self._waiting, entry)

    async def answered(self, concurrency: int) -> list[Answer | Refusal]:
        """Wait until a request ended, or for `LOOK_SECONDS`.

        Raises:
            EngineDied: the engine ended. ProbeError: the recording stopped.
        """
        self._admit(concurrency)
        if self._running:
            done, _ = await asyncio.wait(self._running, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                self._left -= 1
                name = self._running.pop(task)
                if task.exception() is not None and name in self._watched:
                    self._hand_on(name)  # before its first token, or nobody waits for it any more
                self._release(name)
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
            _, _, request = heapq.heappop(self._waiting)
            name = asked_rid(request[0])
            begun = None
            if name in self._watched:
                begun = functools.partial(self._begun, name, concurrency)
            self._running[asyncio.ensure_future(self._engine.generate(*request, begun))] = name

    def _begun(self, name: str, concurrency: int) -> None:
        """The first token of a request came."""
        self._release(name)
        self._admit(concurrency)

    def _release(self, name: str) -> None:
        for entry in self._followers.pop(name, []):
            heapq.heappush(self._waiting, entry)

    def _hand_on(self, name: str) -> None:
        """A request was refused: its prompt is not in the cache, and those that wait for it wait for their first."""
        if not (followers := sorted(self._followers.pop(name, []), key=lambda entry: entry[:2])):
            return
        heapq.heappush(self._waiting, followers[0])
        if followers[1:]:
            heir = asked_rid(followers[0][2][0])
            self._followers[heir] += followers[1:]
            self._watched.add(heir)


async def last_of(answers: AsyncIterator[dict[str, Any]], begun: Callable[[], None]) -> dict[str, Any]:
    """The last answer of a stream of SGLang's, each of which has the tokens of those before it; `begun` is called at
    the first.

    Raises:
        ValueError: SGLang did not serve the request, which it raises by itself where there is no stream
            (`TokenizerManager._handle_abort_finish_reason`).
    """
    last: dict[str, Any] | None = None
    async for told in answers:
        finish = told["meta_info"].get("finish_reason") or {}
        if finish.get("type") == "abort" and 400 <= (finish.get("status_code") or 0) < 600:
            raise ValueError(finish["message"])
        if last is None:
            begun()
        last = told
    if last is None:
        raise ValueError("SGLang answered nothing")
    return last


def _outcome(task: asyncio.Task[Answer]) -> Answer | Refusal:
    try:
        return task.result()
    except RequestRefused as e:
        return e.refusal


def words_of(error: Exception) -> str:
    """What an exception says. FastAPI's has the message in `detail`."""
    return str(getattr(error, "detail", None) or error) or type(error).__name__
