"""Engines for a series of recordings: one at a time, kept as long as the next recording can use it."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from sglang_probe.engine.hooks import instruments
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.harvest.engine import ProbedEngine


class EngineHost:
    """Use as a context manager; leaving it ends the engine."""

    def __init__(self) -> None:
        self._engine: ProbedEngine | None = None
        self._key: Any = None
        self.starts = 0
        """Engines started so far."""

    def __enter__(self) -> EngineHost:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def serves(self, key: Any) -> bool:
        """Whether the running engine was started with `key`."""
        return self._engine is not None and _serves(self._key, key)

    def open(self, model_path: str, server: dict[str, Any], probe: EngineProbeConfig) -> ProbedEngine:
        """An engine that was started with these server arguments and records as `probe` says.

        Raises:
            ProbeError: SGLang or the probe refuses.
        """
        key = engine_key(model_path, server, probe)
        if self.serves(key) and self._engine is not None:
            self._engine.begin(probe)
            return self._engine
        self.stop()
        engine = ProbedEngine(model_path, probe, server)
        engine.start()
        self._engine, self._key = engine, key
        self.starts += 1
        return engine

    def stop(self) -> None:
        """End the engine, if there is one."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.stop()


def engine_key(model_path: str, server: dict[str, Any], probe: EngineProbeConfig) -> tuple[Any, ...]:
    """What two recordings must agree in to share an engine: what SGLang is started with, and what its instruments can
    do for both."""
    return (model_path, sorted(server.items(), key=str), probe)


def _serves(started: Any, asked: Any) -> bool:
    return started is not None and started[:2] == asked[:2] and instruments.serves(started[2], asked[2])
