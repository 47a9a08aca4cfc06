"""Several engines that make one recording together, used like one (`harvest/engine.py`).

Each engine, a *replica*, writes a ledger of its own into the same run directory, as a data-parallel rank does, and the
reader merges them. Requests go to replicas by whole prefix families (`harvest/families.py`). A replica that ends is
started again: its durable parts stay, and what it had been given and had not made durable is asked again under another
name, `<rid>~<number>`, as `--resume` does. So nothing is lost, and nothing is recorded twice; what was answered and not
yet durable when its engine ended is served twice.

Where the processes run is no business of this file (`harvest/places.py`, `harvest/on_ray.py`).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sglang_probe.engine.hooks.config import ENGINE_FILE, EngineProbeConfig, fault_file
from sglang_probe.errors import ProbeError, RunDirectoryError
from sglang_probe.harvest.death import EngineDied
from sglang_probe.harvest.directory import served
from sglang_probe.harvest.families import (
    Cut,
    Family,
    FamilyQueue,
    Order,
    families_of,
    perhaps_in_flight,
    ready,
    turns_by_families,
    turns_of,
)
from sglang_probe.harvest.in_flight import Answer, Asked, Refusal, Turn
from sglang_probe.harvest.places import Lost, Place, Places
from sglang_probe.harvest.replica import EngineArguments, Told
from sglang_probe.run import journal
from sglang_probe.workload.request import asked_rid

logger = logging.getLogger("sglang_probe")

_TRIES = 3
"""Ends of a replica one after the other, with no request answered between them, after which it is given up."""
_STILL_ENDING = 180.0
"""Seconds that the engine of a lost process may take to end and to let go of its ledger. The lock of a machine that was
lost stands on NFS 4 until its lease has run out, 90 s by default."""
_STOP_SECONDS = 90.0
_LOST = "its log says more; --resume finishes the run"


@dataclass
class _Worker:
    """A replica, over all engines that it has in the course of a recording."""

    rank: int
    place: Place | None = None
    left: int = 0
    """Requests that it was given and has not answered."""
    ready: int = 0
    """Of these, those that wait for no other."""
    given: dict[str, Asked] = field(default_factory=dict)
    """By name: what its present engine was given in this recording, but for what SGLang refused."""
    unanswered: dict[str, None] = field(default_factory=dict)
    alone: bool = False
    """It serves one request, which may be what ends engines, and nothing else."""
    ends: int = 0
    """Of its engines, since the last answer."""
    starting: bool = False
    """An engine is started in the place of one that ended."""
    recovering: bool = False
    """Its engine ended, and what becomes of its requests is not settled."""
    closed: bool = False


class Replicas:
    """Running engines of one recording after the other, with the methods of `ProbedEngine`.

    Args:
        probe: of the first recording, as of one engine.
        server: SGLang server arguments of each engine.
        count: how many engines.
        places: gives the processes.
    """

    def __init__(
        self, model_path: str, probe: EngineProbeConfig, server: dict[str, Any], count: int, places: Places
    ) -> None:
        self._model_path, self._server, self._probe, self._places = model_path, server, probe, places
        self._workers = [_Worker(rank) for rank in range(count)]
        self.restarts = 0
        """Engines that took the place of others in this recording."""
        self._order: Order = "as_given"
        self._each = 1
        self._turns: dict[str, Turn] = {}
        self._family: dict[str, int] = {}
        self._queue = FamilyQueue([], count)
        self._families: list[Family] = []
        self._cuts: list[Cut] = []
        self._ended: list[dict[str, Any]] = []

    def start(self) -> None:
        """Start all engines; returns when they can serve.

        Raises:
            ValueError: SGLang refuses an argument. EngineDied: an engine did not start.
        """
        try:
            self.run(self._all(self._start(w) for w in self._workers))
        except BaseException:
            self._end()
            raise

    def begin(self, probe: EngineProbeConfig) -> None:
        """Begin another recording in the running engines.

        Raises:
            ProbeError: one refuses, or ended.
        """
        self._probe, self.restarts = probe, 0
        self._queue = FamilyQueue([], len(self._workers))
        self._families, self._cuts, self._ended = [], [], []

        async def begin(worker: _Worker) -> None:
            if worker.place is None:
                await self._start(worker)
                return
            _raise(await self._ask(worker, "begin", self._probe_of(worker)), worker)
            self._new(worker)

        self.run(self._all(begin(w) for w in self._workers))

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end."""
        return asyncio.run(main)

    def in_force(self) -> dict[str, Any]:
        """As `ProbedEngine.in_force`; and `replicas`: how the work was shared out."""
        told: dict[str, Any] = json.loads((self._probe.run / ENGINE_FILE).read_text(encoding="utf-8"))
        shared = {
            "count": len(self._workers),
            "families": len(self._families),
            "cut": [{"positions": c.positions, "pieces": c.pieces} for c in self._cuts],
            "stolen": self._queue.stolen,
            "ended": self._ended,
        }
        return {**told, "replicas": shared}

    async def serve_groups(
        self, groups: Sequence[Sequence[Asked]], concurrency: int | None = None, *, order: Order = "as_given"
    ) -> AsyncIterator[Answer | Refusal]:
        """Serve requests, and close the recording; a request that was asked again is answered again.

        Args:
            groups: the first is served by families; those of the others, one at a time, once nothing else waits.
            concurrency: at most so many in flight in each engine.
            order: of the requests of each family.

        Raises:
            EngineDied: an engine ended again and again. ProbeError: the recording stopped.
        """
        first, *others = groups or [[]]
        self._each = each = concurrency or max(len(first), 1)
        page_size = int(self._server.get("page_size") or 1)
        self._families, self._cuts = families_of(first, page_size=page_size, engines=len(self._workers))
        self._queue = FamilyQueue(self._families, len(self._workers))
        self._turns = turns_of(first, self._families, each)
        self._order = order
        for f in self._families:
            self._take_turns(f.requests)
        self._family = {asked_rid(rid): i for i, f in enumerate(self._families) for rid, _, _ in f.requests}
        alone = [request for group in others for request in group]
        ends = Counter({asked_rid(rid): 1 for rid, _, _ in alone})
        calls: dict[asyncio.Task[Told], _Worker] = {}
        try:
            while True:
                for worker in self._workers:
                    if worker not in calls.values() and (turn := self._turn(worker, each, ends, alone)) is not None:
                        calls[asyncio.ensure_future(turn)] = worker
                if not (alone or self._queue.waiting) and all(w.starting for w in calls.values()):
                    break  # all is done, by others, before an engine that was to help is there
                done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                for call in done:
                    calls.pop(call)
                    for answer in call.result().answers:
                        yield answer
        finally:
            for call, worker in calls.items():
                call.cancel()
                if worker.starting:
                    self._let_go(worker)

    def close_recording(self) -> None:
        """Have every engine write what it knows.

        Raises:
            ProbeError: one ended, or stopped recording.
        """

        async def close(worker: _Worker) -> None:
            if worker.place is not None and not worker.closed:
                _raise(await self._ask(worker, "close_recording"), worker)
                worker.closed = True

        self.run(self._all(close(w) for w in self._workers))

    def stop(self) -> None:
        """Close the recordings, and end the engines and their processes."""

        async def stop(worker: _Worker) -> None:
            if worker.place is not None:
                await self._ask(worker, "stop")

        async def all_of_them() -> None:
            await asyncio.wait([asyncio.ensure_future(stop(w)) for w in self._workers], timeout=_STOP_SECONDS)

        try:
            self.run(all_of_them())
        finally:
            self._end()

    def _end(self) -> None:
        for worker in self._workers:
            self._let_go(worker)
        self._places.close()

    async def _all(self, calls: Iterable[Coroutine[Any, Any, None]]) -> None:
        """All of them to their end, then the first error."""
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    def _take_turns(self, family: Sequence[Asked]) -> None:
        """Those of one family that one engine gets, by what they share with each other; each keeps its number in the
        workload, by which those of several families are sent."""
        if self._order == "families":
            page_size = int(self._server.get("page_size") or 1)
            for name, turn in turns_by_families(family, page_size=page_size).items():
                self._turns[name] = replace(turn, number=self._turns[name].number)

    def _probe_of(self, worker: _Worker) -> EngineProbeConfig:
        start = self._probe.start + self.restarts
        return self._probe.model_copy(update={"start": start, "replica": worker.rank})

    def _new(self, worker: _Worker) -> None:
        worker.left, worker.ready, worker.alone, worker.closed = 0, 0, False, False
        worker.given, worker.unanswered = {}, {}

    async def _start(self, worker: _Worker) -> None:
        told = await self._place(worker)
        if told.refused:
            raise ValueError(told.fault)
        _raise(told, worker)

    async def _place(self, worker: _Worker) -> Told:
        arguments = EngineArguments(self._model_path, self._probe_of(worker), self._server)
        self._new(worker)
        try:
            worker.place = self._places.place(worker.rank, arguments)
        except Lost as e:
            return Told(died=True, fault=f"no process for it can be had ({e})", fix=_LOST)
        return await self._ask(worker, "start")

    async def _ask(self, worker: _Worker, method: str, *args: Any) -> Told:
        assert worker.place is not None
        try:
            return await worker.place.call(method, *args)
        except Lost as e:
            at_most = perhaps_in_flight(worker.unanswered, self._turns, self._each)  # it did not say
            return Told(died=True, fault=f"its process is gone ({e})", fix=_LOST, in_flight=at_most)

    def _turn(
        self, worker: _Worker, concurrency: int, ends: Counter[str], alone: list[Asked]
    ) -> Coroutine[Any, Any, Told] | None:
        """What a replica does now; None: nothing any more.

        One that is idle is asked on while another's work may become its own; and so it is seen to be alive, because
        what it answered may not be durable yet.
        """
        more: list[Asked] = []
        work = self._queue.waiting or bool(alone)
        if worker.closed or (worker.place is None and not work):
            return None
        if worker.place is None:
            return self._start_again(worker, ends, alone)
        worker.alone = worker.alone and worker.left > 0
        while worker.ready < concurrency and not worker.alone:
            # Its own families as long as it could send more; those of others once it has little left.
            family = self._queue.take(worker.rank, steal=worker.left + len(more) < concurrency)
            if family is None:
                break
            more += family.requests
            worker.ready += len(ready([rid for rid, _, _ in family.requests], self._turns))
        if not more and worker.left == 0 and alone and not self._queue.waiting:
            worker.alone, more = True, [alone.pop(0)]
        elif not work and not any(w.unanswered or w.recovering for w in self._workers):
            return self._step(worker, ends, alone, "close_recording")
        worker.left += len(more)
        worker.given.update((request[0], request) for request in more)
        worker.unanswered.update(dict.fromkeys(request[0] for request in more))
        names = [asked_rid(request[0]) for request in more]
        turns = {name: self._turns[name] for name in names if name in self._turns}
        return self._step(worker, ends, alone, "step", more, concurrency, turns)

    async def _start_again(self, worker: _Worker, ends: Counter[str], alone: list[Asked]) -> Told:
        worker.starting = True
        told = await self._place(worker)
        worker.starting = False
        if told.died or told.refused:  # as if it had ended later
            return await self._recovered(worker, told, ends, alone)
        _raise(told, worker)
        return Told()

    async def _recovered(self, worker: _Worker, told: Told, ends: Counter[str], alone: list[Asked]) -> Told:
        worker.recovering = True
        refused = await self._recover(worker, told, ends, alone)
        worker.recovering = False
        return Told(refused)

    def _let_go(self, worker: _Worker) -> None:
        place, worker.place, worker.starting = worker.place, None, False
        if place is not None:
            place.end()

    async def _step(self, worker: _Worker, ends: Counter[str], alone: list[Asked], method: str, *args: Any) -> Told:
        told = await self._ask(worker, method, *args)
        if told.died:
            return await self._recovered(worker, told, ends, alone)
        _raise(told, worker)
        worker.closed, worker.left, worker.ready = method == "close_recording", told.left, told.ready
        for answer in told.answers:
            worker.ends = 0
            worker.unanswered.pop(answer.rid)
            if isinstance(answer, Refusal):
                del worker.given[answer.rid]
        return told

    async def _recover(
        self, worker: _Worker, told: Told, ends: Counter[str], alone: list[Asked]
    ) -> list[Answer | Refusal]:
        """What an engine that ended had been given is asked again, but for what is durable.

        Args:
            ends: how many engines ended while they served a request; this end is added.
            alone: gets the requests that were in flight when an engine ended for the second time.

        Returns what is not asked again: it ended an engine when it was served alone.
        """
        was_alone = worker.alone
        self._let_go(worker)
        worker.ends += 1
        if worker.ends > _TRIES:
            what = f"replica {worker.rank} ended {worker.ends} times and answered nothing meanwhile: {told.fault}"
            raise EngineDied(what, fix=told.fix or "see its log", in_flight=told.in_flight)
        durable = await asyncio.to_thread(self._durable, worker.rank)
        self.restarts += 1
        ends.update(map(asked_rid, told.in_flight))
        again: list[Asked] = []
        refused: list[Answer | Refusal] = []
        lost = [request for rid, request in worker.given.items() if rid not in durable]
        for rid, prompt, sampling in lost:
            name = asked_rid(rid)
            request: Asked = (f"{name}~{self._probe.start + self.restarts}", prompt, sampling)
            if was_alone and rid in told.in_flight:
                why = "the engine ended twice with it, the second time when it was served alone"
                refused.append(Refusal(rid, f"{why}: {told.fault}"))
            elif ends[name] > 1 and rid in told.in_flight:
                alone.append(request)
            else:
                again.append(request)
        self._new(worker)
        self._ended.append({"replica": worker.rank, "reason": told.fault, "asked_again": len(lost) - len(refused)})
        logger.warning("replica %d: %s; %d requests are asked again", worker.rank, told.fault, len(lost) - len(refused))
        families: dict[int, list[Asked]] = {}
        for request in again:
            families.setdefault(self._family.get(asked_rid(request[0]), -1), []).append(request)
        for _, one in sorted(families.items(), reverse=True):
            self._take_turns(one)  # whom they waited for may be durable, and is not in the next engine's cache
            self._queue.give_back(worker.rank, Family.of(one))
        return refused

    def _durable(self, rank: int) -> set[str]:
        """Names of the requests whose whole record is on disk, once the engine that ended has let go of its ledger.
        What it said at its end is no fault of the next one.

        Raises:
            ProbeError: it does not let go.
        """
        try:
            with journal.lock(self._probe.run, rank, wait=_STILL_ENDING):
                (self._probe.run / fault_file(rank)).unlink(missing_ok=True)
                return served(self._probe.run)
        except RunDirectoryError as e:
            raise ProbeError(
                f"replica {rank} ended, and {_STILL_ENDING:.0f} s later its ledger is still locked: {e.message}",
                fix="end what is left of it on its machine (a machine that was lost holds its locks on a shared file "
                "system until that lets them go); --resume finishes the run",
            ) from e


def _raise(told: Told, worker: _Worker) -> None:
    """
    Raises:
        EngineDied: it ended. ProbeError: it stopped recording, or refuses.
    """
    if told.died:
        raise EngineDied(f"replica {worker.rank}: {told.fault}", fix=told.fix or "", in_flight=told.in_flight)
    if told.fault is not None:
        raise ProbeError(f"replica {worker.rank}: {told.fault}", fix=told.fix)
