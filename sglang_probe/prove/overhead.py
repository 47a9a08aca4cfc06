"""What recording costs: the same engine with a recording and without one, in turn.

Without a recording the hooks are in place and return at once; taps that are part of graphs stay in them. So the ratio
is of what a recording adds, in one engine of the same age, with the same memory and the same neighbours on the machine.

A round is four batches, two with a recording between two without, or the other way round in every second one: what
drifts steadily within a round cancels. Beside the ratio stands what two batches of a round without a recording differ
by, which is what the machine alone does.
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
from sglang_probe.stats.median import MedianInterval, median_interval

Todo = Sequence[tuple[str, Sequence[int], dict[str, Any]]]


Pair = tuple[float, float]


@dataclass(frozen=True)
class Overhead:
    """Seconds of the batches of each round, two with and two without a recording."""

    recorded: list[Pair]
    plain: list[Pair]
    tokens: int
    """Decoded in each batch."""

    @property
    def ratios(self) -> list[float]:
        """Throughput while recording over throughput without, of each round."""
        return [sum(p) / sum(r) for p, r in zip(self.plain, self.recorded, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> MedianInterval | None:
        """Of that median; None with too few rounds."""
        return median_interval(self.ratios)

    @property
    def floor(self) -> Pair:
        """Between these lie the ratios of two batches without a recording, of every round."""
        ratios = [first / second for first, second in self.plain]
        return min(ratios), max(ratios)

    @property
    def note(self) -> str:
        """In words."""
        n = len(self.ratios)
        found = self.interval
        sure = f"{n} rounds, too few for an interval"
        if found is not None:
            sure = f"{found.low:.2f} to {found.high:.2f}, {found.confidence:.0%} interval of {n} rounds"
        low, high = self.floor
        floor = f"two batches without recording differ by {low:.2f} to {high:.2f}"
        return f"throughput {self.ratio:.2f} of that without recording ({sure}; {floor})"

    def to_json(self) -> dict[str, Any]:
        """For the certificate."""
        found = self.interval
        return {
            "ratio": round(self.ratio, 4),
            "interval": None if found is None else [round(found.low, 4), round(found.high, 4)],
            "confidence": None if found is None else round(found.confidence, 4),
            "floor": [round(v, 4) for v in self.floor],
            "ratios": [round(r, 4) for r in self.ratios],
            "seconds_recorded": self.recorded,
            "seconds_plain": self.plain,
            "tokens": self.tokens,
        }


_BATCH, _PROMPT = 8, 32
_SHORTEST, _LONGEST = 16, 192
"""Tokens of an output: so few that a batch fits into the smallest KV pool of a proof."""
_SECONDS = 1.0
"""That a batch should take: many short ones in turn say more of a busy machine than a few long ones."""


def measure(host: EngineHost, job: Job, folder: Path, *, rounds: int) -> Overhead:
    """Decode batches, four a round, with a recording and without one, in the engine that is running.

    Two first batches, which are recorded, warm up and say how long the others are; they are not counted. What is
    written after the last answer is not either.
    """
    rng = random.Random(0)
    vocabulary = job.prepared.model.vocabulary
    job = replace(job, slot_truth=None)
    taken: dict[bool, list[Pair]] = {True: [], False: []}
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
        seconds_of: dict[bool, list[float]] = {True: [], False: []}
        outer = bool(n % 2)
        for i, recorded in enumerate((outer, not outer, not outer, outer)):
            name = f"round-{n}-{i}-{'recorded' if recorded else 'plain'}"
            if recorded:
                _begin(host, job, folder / name)
            seconds_of[recorded].append(_seconds(engine, todo(name)))
            if recorded:
                engine.close_recording()
        for recorded, (first, second) in seconds_of.items():
            taken[recorded].append((first, second))
    return Overhead(taken[True], taken[False], _BATCH * new)


def _begin(host: EngineHost, job: Job, path: Path) -> ProbedEngine:
    path.mkdir(parents=True)
    engine = host.open(job.prepared.model.path, job.server, probe_config(job, path, job.asks), job.pool)
    assert isinstance(engine, ProbedEngine)
    return engine


def _seconds(engine: ProbedEngine, todo: Todo) -> float:
    async def drain() -> None:
        async for _ in engine.serve(todo, _BATCH):
            pass

    began = time.perf_counter()
    engine.run(drain())
    return time.perf_counter() - began
