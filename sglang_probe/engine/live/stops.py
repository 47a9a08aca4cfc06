"""When a live recording stops, why, and when it tries again.

It never gives up: the first attempt comes after a second, each further one after twice as long, up to a minute, and
after a recording that lasted that long the count begins anew.
"""

from __future__ import annotations

import time
from typing import Any

from sglang_probe.errors import LedgerError, ProbeError

DISK, LEDGER, PROBE = "disk", "ledger", "probe"
REASONS = (DISK, LEDGER, PROBE)
"""Why a recording stops: the disk failed or was too slow; what SGLang did cannot be attributed to a request; a fault of
the probe's own. These are the values of the label `reason` of `sglang_probe:recording_stops_total`."""

_FIRST, _LONGEST = 1.0, 60.0


class DiskTooSlow(LedgerError):
    """The disk has been too slow for too long."""


def reason_of(error: BaseException) -> str:
    """One of `REASONS`."""
    if isinstance(error, OSError | DiskTooSlow):  # TimeoutError is an OSError
        return DISK
    return LEDGER if isinstance(error, ProbeError) else PROBE


class Stops:
    """The state of one recording: it goes on, or it has stopped and will be tried again."""

    def __init__(self) -> None:
        self.fault: str | None = None
        """Why nothing is recorded now; None: something is."""
        self.counts = dict.fromkeys(REASONS, 0)
        self._wait = _FIRST
        self._since = time.monotonic()
        self._next = 0.0

    def stop(self, fault: str, reason: str) -> None:
        """The recording stops."""
        self.fault = fault
        self.counts[reason] += 1
        if time.monotonic() - self._since > _LONGEST:
            self._wait = _FIRST
        self.postpone()

    def postpone(self) -> None:
        """The next attempt comes later."""
        self._next = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, _LONGEST)

    @property
    def due(self) -> bool:
        """Whether it is time for an attempt."""
        return self.fault is not None and time.monotonic() >= self._next

    def resume(self) -> None:
        """The recording goes on."""
        self.fault, self._since = None, time.monotonic()

    def state(self) -> dict[str, Any]:
        """For every endpoint: whether it records, why not, and when it tries again."""
        stopped = self.fault is not None
        return {
            "recording": not stopped,
            "reason": self.fault,
            "tries_again_in": round(max(self._next - time.monotonic(), 0.0), 1) if stopped else None,
            "stops": dict(self.counts),
        }
