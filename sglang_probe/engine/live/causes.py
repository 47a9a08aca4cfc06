"""Causes of computed tokens, found by a process of low priority that reads what was written; nothing here computes.

The keeper asks after each closed segment (`live: {causes: true}`) and counts what it hears, for `/metrics`. The HTTP
process asks for `GET /probe/why`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger("sglang_probe")

_SECONDS = 600.0
"""How long one segment may take; then its causes are not known, and the next one is asked about."""

_MOST_WAITING = 256
"""Segments that may wait. The causes of one more are not known."""

COMMAND = (sys.executable, "-m", "sglang_probe.studies.why.live")


def environment() -> dict[str, str]:
    """Of that process: it records nothing, and takes one core at most."""
    return {**{k: v for k, v in os.environ.items() if k != "SGLANG_PROBE"}, "OMP_NUM_THREADS": "1"}


class Causes:
    """Asks about closed segments, one after the other; `turn` never waits."""

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter()
        """By cause, of the closed segments that were answered."""
        self.failed = 0
        self._waiting: deque[Path] = deque()
        self._running: tuple[subprocess.Popen[bytes], IO[bytes], Path, float] | None = None

    def ask(self, segment: Path) -> None:
        """A segment was closed."""
        if len(self._waiting) >= _MOST_WAITING:
            self.failed += 1
            return
        self._waiting.append(segment)

    def turn(self) -> None:
        """Take an answer that is there, and ask for the next."""
        if self._running is not None:
            process, out, segment, began = self._running
            if process.poll() is None:
                if time.monotonic() - began < _SECONDS:
                    return
                process.kill()
                process.wait(10)
            self._running = None
            with out:
                out.seek(0)
                self._heard(out.read(), segment)
        if self._waiting:
            segment = self._waiting.popleft()
            out = tempfile.TemporaryFile()  # noqa: SIM115 - read by a later turn
            with tempfile.TemporaryFile() as asked:
                asked.write(json.dumps({"segment": str(segment)}).encode())
                asked.seek(0)
                process = subprocess.Popen(
                    COMMAND, stdin=asked, stdout=out, stderr=subprocess.DEVNULL, env=environment()
                )
            self._running = (process, out, segment, time.monotonic())

    def close(self) -> None:
        """End what runs."""
        if self._running is not None:
            process, out, *_ = self._running
            process.kill()
            process.wait(10)
            out.close()
            self._running = None

    def _heard(self, said: bytes, segment: Path) -> None:
        try:
            told: dict[str, Any] = json.loads(said)
            self.tokens.update({str(k): int(n) for k, n in told["causes"].items()})
        except (ValueError, KeyError, TypeError, AttributeError):
            self.failed += 1
            logger.warning("sglang-probe could not tell the causes of %s: %s", segment, said[:300])
