"""The time of forward passes: unix seconds that never go back within a process, whatever is done to the machine's
clock, which may be set by a day while an engine runs."""

from __future__ import annotations

import time

_OFFSET = time.time() - time.monotonic()


def now() -> float:
    """Unix seconds, by the clock as it was when this process began."""
    return _OFFSET + time.monotonic()
