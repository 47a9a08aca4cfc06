"""One of several engines of a recording: what runs in its own process, on whatever machine it was placed.

What is asked and answered crosses a process boundary, so that both are plain values; an engine that ended, or that
stopped recording, is an answer too (`Told`), because the one who asks decides what becomes of its requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.errors import ProbeError
from sglang_probe.harvest.death import EngineDied
from sglang_probe.harvest.engine import ProbedEngine
from sglang_probe.harvest.in_flight import Answer, Asked, InFlight, Refusal, Turn


@dataclass(frozen=True)
class EngineArguments:
    """What an engine is started with."""

    model_path: str
    probe: EngineProbeConfig
    server: dict[str, Any]


@dataclass(frozen=True)
class Told:
    """What an engine says."""

    answers: Sequence[Answer | Refusal] = ()
    left: int = 0
    """Requests that wait or are in flight."""
    ready: int = 0
    """Of these, those that wait for no other."""
    died: bool = False
    """It ended; `fault` says how."""
    refused: bool = False
    """SGLang refuses an argument that it was started with."""
    fault: str | None = None
    fix: str | None = None
    in_flight: Sequence[str] = ()
    """What it was serving when it ended."""


class Replica:
    """The methods are called one at a time, in the main thread of a process that does nothing else."""

    def __init__(self, arguments: EngineArguments) -> None:
        self._arguments = arguments
        self._engine: ProbedEngine | None = None
        self._requests: InFlight | None = None

    def start(self) -> Told:
        """Start the engine."""
        a = self._arguments
        engine = ProbedEngine(a.model_path, a.probe, a.server)

        def make() -> Told:
            engine.start()
            self._engine, self._requests = engine, InFlight(engine)
            return Told()

        return _told(make)

    def begin(self, probe: EngineProbeConfig) -> Told:
        """Begin another recording."""
        engine = self._running()

        def make() -> Told:
            engine.begin(probe)
            self._requests = InFlight(engine)
            return Told()

        return _told(make)

    def step(self, more: Sequence[Asked], concurrency: int, turns: Mapping[str, Turn]) -> Told:
        """Serve these too, and answer when a request ended, or after half a second. `turns`: as `InFlight.add`."""
        engine, requests = self._running(), self._requests
        assert requests is not None
        requests.add(more, turns)

        def make() -> Told:
            answers = engine.run(requests.answered(concurrency))
            return Told(answers, len(requests), requests.ready)

        return _told(make)

    def close_recording(self) -> Told:
        """Have the probe write everything that it knows."""
        engine = self._running()

        def make() -> Told:
            engine.close_recording()
            return Told()

        return _told(make)

    def stop(self) -> Told:
        """End the engine, after what it still knows is on disk."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.stop()
        return Told()

    def _running(self) -> ProbedEngine:
        assert self._engine is not None, "the engine was not started"
        return self._engine


def _told(make: Callable[[], Told]) -> Told:
    """What a call gives, or what became of the engine."""
    try:
        return make()
    except EngineDied as e:
        return Told(died=True, fault=e.message, fix=e.fix, in_flight=e.in_flight)
    except ProbeError as e:
        return Told(fault=e.message, fix=e.fix)
    except (ValueError, TypeError) as e:  # SGLang refuses an argument
        return Told(refused=True, fault=str(e))
