"""Clients that send traffic to a running engine, leave, abort, pause and continue."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from sglang_probe.harvest.engine import ProbedEngine
from sglang_probe.harvest.in_flight import Answer
from sglang_probe.prove.traffic import Habits, Traffic
from sglang_probe.workload.request import Request, SegmentSpan


class Clients:
    """Serves requests in waves, with aborts and pauses inside and flushes between: `serving` of `harvest`.

    Args:
        requests: those of the traffic, by index; one that continues another is replaced when it is sent.
    """

    def __init__(self, habits: Habits, traffic: list[Traffic], requests: list[Request]) -> None:
        self.habits = habits
        self.traffic = traffic
        self.requests = requests
        self.rng = random.Random(habits.seed + 2)
        self.answers: dict[int, Answer] = {}
        self.counts = dict.fromkeys(
            ("served", "aborted", "left", "refused", "flushed", "paused", "continued", "samples"), 0
        )

    async def serve(self, engine: ProbedEngine) -> AsyncIterator[Answer]:
        """Send everything; the answers of those who waited for them.

        Raises:
            ProbeError: the engine ended, or the recording stopped.
        """
        self.engine, self.manager = engine, engine.tokenizer_manager
        rest = list(self.traffic)
        while rest:
            size = self.rng.randint(*self.habits.waves)
            wave, rest = rest[:size], rest[size:]
            gate = asyncio.Semaphore(self.habits.concurrency)
            disturbing = asyncio.ensure_future(self._disturb())
            for answers in await asyncio.gather(*(self._one(gate, t) for t in wave)):
                for answer in answers:
                    yield answer
            await disturbing
            engine.look()
            if self.rng.random() < 0.25:
                self.counts["flushed"] += bool((await self.manager.flush_cache()).success)
        await self.manager.flush_cache(timeout_s=30)  # waits for requests whose clients have gone away

    async def _disturb(self) -> None:
        """Pause and go on, or abort everything, in the middle of a wave."""
        if self.habits.pauses:
            await asyncio.sleep(self.rng.random() * 0.5)
            await self.engine.pause(self.rng.choice(["retract", "in_place"]))
            await asyncio.sleep(0.05)
            await self.engine.unpause()
            self.counts["paused"] += 1
        if self.rng.random() < 0.1:
            await asyncio.sleep(self.rng.random() * 0.5)
            self.manager.abort_request(abort_all=True)

    async def _one(self, gate: asyncio.Semaphore, traffic: Traffic) -> list[Answer]:
        from fastapi import HTTPException

        async with gate:
            request = self._continued(traffic)
            self.requests[request.index] = request
            timer = None
            if traffic.abort_after is not None:
                timer = asyncio.get_running_loop().call_later(traffic.abort_after, self._abort, request.rid)
            try:
                generated = await self._ask(request, traffic)
            except (ValueError, HTTPException):  # how SGLang answers an abort, a full queue, and what it refuses
                self.counts["refused"] += 1
                return []
            finally:
                if timer is not None:
                    timer.cancel()
        answers = [
            Answer(g["meta_info"]["id"], list(g["output_ids"]), int(g["meta_info"]["cached_tokens"]))
            for g in generated
            if (g["meta_info"]["finish_reason"] or {}).get("type") not in (None, "abort")
        ]
        if answers:
            self.answers[request.index] = answers[0]
            self.counts["served"] += 1
            self.counts["samples"] += len(answers) - 1
        return answers

    def _continued(self, traffic: Traffic) -> Request:
        """The request, continuing an earlier one if that has been answered and leaves room."""
        ours = traffic.request
        earlier = self.answers.get(traffic.follows) if traffic.follows is not None else None
        if earlier is None or traffic.follows is None:
            return ours
        said = (*self.requests[traffic.follows].prompt_ids, *earlier.output_ids)
        prompt = (*said, *ours.prompt_ids[-traffic.tail :]) if traffic.tail else said
        if len(prompt) > self.habits.longest:
            return ours
        self.counts["continued"] += 1
        return replace(ours, prompt_ids=prompt, spans=(SegmentSpan("prompt", 0, len(prompt)),))

    async def _ask(self, request: Request, traffic: Traffic) -> list[dict[str, Any]]:
        """Send it and read the answer, one for each sample; none if the client went away."""
        options = dict(traffic.options)
        stream = options.pop("stream", False) or traffic.reads is not None
        last: dict[str, dict[str, Any]] = {}
        pieces = 0
        answer = self.engine.ask(request.rid, request.prompt_ids, request.sampling_params, stream=stream, **options)
        async for said in answer:
            last |= {s["meta_info"]["id"]: s for s in (said if isinstance(said, list) else [said])}
            pieces += 1
            if pieces == traffic.reads and not all(s["meta_info"]["finish_reason"] for s in last.values()):
                self.counts["left"] += 1
                self._abort(request.rid)  # as SGLang's HTTP server does when a client disconnects
                await answer.aclose()
                return []
        return list(last.values())

    def _abort(self, rid: str) -> None:
        self.counts["aborted"] += 1
        for known in [r for r in self.manager.rid_to_state if r.startswith(rid)]:  # its samples have names of their own
            self.manager.abort_request(rid=known)
