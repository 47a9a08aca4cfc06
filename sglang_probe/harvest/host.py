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
        self._started: tuple[str, dict[str, Any], EngineProbeConfig] | None = None
        """What the engine was started with: model path, server arguments, and what its first recording asked."""
        self.starts = 0
        """Engines started so far."""

    def __enter__(self) -> EngineHost:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def serves(self, model_path: str, server: dict[str, Any], probe: EngineProbeConfig) -> bool:
        """Whether the running engine can make this recording too: SGLang was started with the same arguments, and its
        instruments can do what is asked."""
        if self._engine is None or self._started is None:
            return False
        *same, first = self._started
        return same == [model_path, server] and instruments.serves(first, probe)

    def open(self, model_path: str, server: dict[str, Any], probe: EngineProbeConfig) -> ProbedEngine:
        """An engine that was started with these server arguments and records as `probe` says.

        Raises:
            ProbeError: SGLang or the probe refuses.
        """
        if self._engine is not None and self.serves(model_path, server, probe):
            self._engine.begin(probe)
            return self._engine
        self.stop()
        engine = ProbedEngine(model_path, probe, server)
        engine.start()
        self._engine, self._started = engine, (model_path, server, probe)
        self.starts += 1
        return engine

    def stop(self) -> None:
        """End the engine, if there is one."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.stop()
