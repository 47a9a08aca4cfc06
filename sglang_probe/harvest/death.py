"""How the processes of an engine ended, in words, and what to do about it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sglang_probe.engine.hooks.config import CRASHED, fault_file
from sglang_probe.engine.platform.defaults import SGLANG_WATCHDOG_SECONDS, WATCHDOG_SECONDS
from sglang_probe.errors import ProbeError

_MEMORY = (
    "most likely the machine ran out of memory (`dmesg` says so): lower `concurrency`, or "
    "`server: {max_total_tokens: ...}`; then finish the run with --resume"
)
_WATCHDOG = (
    "SGLang's watchdog ends an engine whose forward pass takes longer than `server: {watchdog_timeout: ...}` "
    f"({SGLANG_WATCHDOG_SECONDS} s on an accelerator, at least {WATCHDOG_SECONDS:,} s on the CPU reference platform): "
    "raise it, or lower `server: {chunked_prefill_size: ...}`"
)
RESUME = "its log above says more; --resume finishes the run, with the requests in flight last and one at a time"


class EngineDied(ProbeError):
    """A process of the engine ended while it was needed. `in_flight`: requests that were being served, oldest first."""

    def __init__(self, message: str, *, fix: str, in_flight: Sequence[str] = ()) -> None:
        super().__init__(message, fix=fix)
        self.in_flight = tuple(in_flight)


def crashed(fault: str | None) -> bool:
    """Whether this is what a scheduler says that ends by an exception."""
    return fault is not None and fault.startswith(CRASHED)


def fault_of(run: Path, replica: int = 0) -> str | None:
    """Why the probe stopped recording in an engine of this run, if it did."""
    path = run / fault_file(replica)
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


@dataclass(frozen=True)
class End:
    """How a process ended."""

    words: str
    fix: str


def end_of(exit_code: int | None, watchdog: float | None = None) -> End:
    """How a process with this exit code ended; negative: by that signal. None: it is alive, and said that it failed.

    Args:
        watchdog: `watchdog_timeout` of the engine in seconds, if it was given.
    """
    if exit_code is None:
        here = "" if watchdog is None else f"; SGLang's watchdog waits {watchdog:g} s for a forward pass here"
        return End(f"a process of the engine does not answer any more{here}", _WATCHDOG)
    if exit_code < 0:
        name = signal.Signals(-exit_code).name if -exit_code in list(signal.Signals) else f"signal {-exit_code}"
        return End(f"a process of the engine was killed by {name}", _MEMORY if name == "SIGKILL" else RESUME)
    return End(f"a process of the engine ended with exit code {exit_code}", RESUME)


class Children:
    """The processes that SGLang started for an engine."""

    def __init__(self, processes: Iterable[BaseProcess | Any] = (), watchdog: float | None = None) -> None:
        self._processes = list(processes)
        self._watchdog = watchdog

    def ended(self) -> End | None:
        """How the first one that is not alive ended; None while all are."""
        found = next((p for p in self._processes if not p.is_alive()), None)
        return None if found is None else end_of(found.exitcode)

    def wait_for_end(self, seconds: float = 10.0) -> End:
        """One said that it failed: how it ended, or that it did not."""
        deadline = time.monotonic() + seconds
        while (end := self.ended()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return end or end_of(None, self._watchdog)

    @contextmanager
    def alone(self, engine: Any) -> Iterator[None]:
        """While this lasts, SGLang's `Engine.shutdown` ends these processes alone: of itself it ends every child of the
        process that calls it, those that its caller started too."""
        module = sys.modules[type(engine).__module__]
        everybody = getattr(module, "kill_process_tree", None)
        if everybody is None:
            yield
            return

        def ours(pid: int | None, *args: Any, **options: Any) -> None:
            if pid not in (None, os.getpid()):
                everybody(pid, *args, **options)
                return
            for process in self._processes:
                if process.is_alive():
                    everybody(process.pid, wait_timeout=options.get("wait_timeout", 60))
                process.join(10)

        module.kill_process_tree = ours  # type: ignore[attr-defined]
        try:
            yield
        finally:
            module.kill_process_tree = everybody  # type: ignore[attr-defined]

    def kill(self) -> None:
        """End those that are left."""
        for process in self._processes:
            process.kill()
            process.join(10)
