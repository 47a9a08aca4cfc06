"""What recording costs: the same engine with a recording and without one, alternated.

Without a recording the hooks are in place and return at once; taps that are part of graphs stay in them. So the ratio
is of what a recording adds, in one engine of the same age, with the same memory and the same neighbours on the machine.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_probe.harvest.engine import ProbedEngine
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.job import Job, probe_config

Todo = Sequence[tuple[str, Sequence[int], dict[str, Any]]]


@dataclass(frozen=True)
class Overhead:
    """Seconds of each round, with and without a recording."""

    recorded: list[float]
    plain: list[float]
    tokens: int
    """Decoded in each."""

    @property
    def ratios(self) -> list[float]:
        """Throughput while recording over throughput without, of each round."""
        return [p / r for p, r in zip(self.plain, self.recorded, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.ratios)


_BATCH, _PROMPT = 8, 32
_SHORTEST, _LONGEST = 16, 192
"""Tokens of an output: so few that a batch fits into the smallest KV pool of a proof."""
_SECONDS = 2.0
"""That a batch should take: shorter ones are drowned by whatever else the machine does."""


def measure(host: EngineHost, job: Job, folder: Path, *, rounds: int) -> Overhead:
    """Decode batches in turn with a recording and without one, in the engine that is running.

    Two first batches, which are recorded, warm up and say how long the others are; they are not counted. What is
    written after the last answer is not either.
    """
    rng = random.Random(0)
    vocabulary = job.prepared.model.vocabulary
    job = replace(job, slot_truth=None)
    taken: dict[bool, list[float]] = {True: [], False: []}

    new = _SHORTEST

    def todo(name: str) -> Todo:
        prompts = [[rng.randrange(10, vocabulary) for _ in range(_PROMPT)] for _ in range(_BATCH)]
        params = {"max_new_tokens": new, "temperature": 0.0, "ignore_eos": True}
        return [(f"{name}-{i}", prompt, dict(params)) for i, prompt in enumerate(prompts)]

    engine = _begin(host, job, folder / "warm-up")
    _seconds(engine, todo("warm-up"))
    seconds = _seconds(engine, todo("length"))
    engine.close_recording()
    new = max(_SHORTEST, min(_LONGEST, job.prepared.room - _PROMPT, round(new * _SECONDS / seconds)))
    for n in range(rounds):
        for recorded in (True, False) if n % 2 else (False, True):
            name = f"round-{n}-{'recorded' if recorded else 'plain'}"
            if recorded:
                _begin(host, job, folder / name)
            taken[recorded].append(_seconds(engine, todo(name)))
            if recorded:
                engine.close_recording()
    return Overhead(taken[True], taken[False], _BATCH * new)


def _begin(host: EngineHost, job: Job, path: Path) -> ProbedEngine:
    path.mkdir(parents=True)
    return host.open(job.prepared.model.path, job.server, probe_config(job, path, job.asks), job.pool)


def _seconds(engine: ProbedEngine, todo: Todo) -> float:
    async def drain() -> None:
        async for _ in engine.serve(todo, _BATCH):
            pass

    began = time.perf_counter()
    engine.run(drain())
    return time.perf_counter() - began
