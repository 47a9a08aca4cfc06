"""Engines for a series of recordings: one at a time, kept as long as the next recording can use it."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from sglang_probe.engine.hooks import instruments
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.harvest.engine import ProbedEngine
from sglang_probe.harvest.on_ray import RayPlaces
from sglang_probe.harvest.replicas import Replicas


class EngineHost:
    """Use as a context manager; leaving it ends the engine."""

    def __init__(self) -> None:
        self._engine: ProbedEngine | Replicas | None = None
        self._started: tuple[str, dict[str, Any], int, EngineProbeConfig] | None = None
        """What the engine was started with: model path, server arguments, how many there are, and what its first
        recording asked."""
        self._pool: int | None = None
        self.starts = 0
        """Engines started so far."""

    def __enter__(self) -> EngineHost:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def serves(
        self,
        model_path: str,
        server: dict[str, Any],
        probe: EngineProbeConfig,
        pool: int | None = None,
        replicas: int = 1,
    ) -> bool:
        """Whether the running engine can make this recording too: SGLang was started with the same arguments, its KV
        pool holds as many tokens, and its instruments can do what is asked."""
        if self._engine is None or self._started is None or (self._pool is None) != (pool is None):
            return False
        if pool is not None and self._pool is not None and pool > self._pool:
            return False
        *same, first = self._started
        return same == [model_path, server, replicas] and instruments.serves(first, probe)

    def open(
        self,
        model_path: str,
        server: dict[str, Any],
        probe: EngineProbeConfig,
        pool: int | None = None,
        replicas: int = 1,
    ) -> ProbedEngine | Replicas:
        """An engine that was started with these server arguments and records as `probe` says.

        Args:
            pool: tokens that its KV pool has at least, where nobody chose its size; None: somebody did, or SGLang does.
            replicas: how many engines make the recording together; more than one need Ray.

        Raises:
            ProbeError: SGLang or the probe refuses.
        """
        if self._engine is not None and self.serves(model_path, server, probe, pool, replicas):
            self._engine.begin(probe)
            return self._engine
        self.stop()
        given = server if pool is None else {**server, "max_total_tokens": pool}
        engine: ProbedEngine | Replicas
        if replicas == 1:
            engine = ProbedEngine(model_path, probe, given)
        else:
            engine = Replicas(model_path, probe, given, replicas, RayPlaces(replicas, given))
        engine.start()
        self._engine, self._started, self._pool = engine, (model_path, server, replicas, probe), pool
        self.starts += 1
        return engine

    def stop(self) -> None:
        """End the engine, if there is one."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.stop()
