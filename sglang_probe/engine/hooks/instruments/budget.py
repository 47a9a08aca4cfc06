"""What interventions that requests ask for may cost a forward pass, and what becomes of new ones when they cost more.

Measured is the host's time, by the wall clock: from planning the rows of a forward to the end of the last layer's
changes in it. On a CPU that is all that an intervention costs. On an accelerator it is what enqueues the operations;
they themselves run later, and in a replayed graph Python does not run at all, so that only planning and filling the
buffers are counted there.

Rule: the budget is exceeded when the median of the last `WINDOW` forwards with an intervention is above it, so that a
hiccup, or seven, change nothing. It is kept again when `budget_rest` seconds have passed and the median of what ran
since is not above it, or nothing ran. Requests that run under interventions go on: half of one is none.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sglang_probe.engine.ledger.facts import BudgetEvent
from sglang_probe.steering.config import EXCEEDED, UNSTEERED, WITHIN

if TYPE_CHECKING:
    from sglang_probe.steering.config import SteerConfig

logger = logging.getLogger("sglang_probe")

WINDOW = 15
"""Forwards whose median is compared."""


class Budget:
    """The budget of one engine process.

    Args:
        config: with a `budget_ms`.
        clock: seconds, of what is measured and of what is waited for.
    """

    def __init__(self, config: SteerConfig, clock: Callable[[], float] = time.perf_counter) -> None:
        assert config.budget_ms is not None
        self._limit, self._rest, self.refuses = config.budget_ms, config.budget_rest, config.over_budget == "refuse"
        self.clock = clock
        self._milliseconds: deque[float] = deque(maxlen=WINDOW)
        self._spent = 0.0
        self._last = 0.0
        """When the last forward with an intervention ended."""
        self._since: float | None = None
        """When it was exceeded; None: it is kept."""
        self._events: list[BudgetEvent] = []
        self._turned_away = 0

    def spend(self, since: float) -> None:
        """The time from `since` (`clock`) to now was spent on the forward at hand."""
        self._spent += self.clock() - since

    def forward(self) -> None:
        """The forward at hand is over; nothing to do if it had no intervention."""
        if not self._spent:
            return
        self._milliseconds.append(1e3 * self._spent)
        self._spent, self._last = 0.0, self.clock()
        if self._since is None and len(self._milliseconds) == WINDOW and self._median() > self._limit:
            self._since = self.clock()
            self._note(EXCEEDED)
            logger.warning(
                "sglang-probe: interventions cost %.3g ms a forward, and %.3g are allowed: new ones are %s",
                *(self._median(), self._limit, "refused" if self.refuses else "served without"),
            )
            self._milliseconds.clear()

    def admits(self) -> bool:
        """Whether a request may have its interventions now."""
        now = self.clock()
        if now - self._last >= self._rest:
            self._milliseconds.clear()  # whose they were has ended
        if self._since is not None and now - self._since >= self._rest and self._median() <= self._limit:
            self._note(WITHIN)
            self._since = None
            self._milliseconds.clear()
            logger.warning("sglang-probe: interventions are served again")
        if self._since is not None:
            self._turned_away += 1
        return self._since is None

    def refusal(self) -> str:
        """What a request that is not admitted is told."""
        assert self._since is not None
        left = max(0.0, self._rest - (self.clock() - self._since))
        return (
            f"interventions cost more than {self._limit:g} ms a forward, which is this engine's budget: none is begun "
            f"for now; ask again in {left:.0f} seconds"
        )

    def unsteered(self, rid: str, intervention: str) -> None:
        """A request that asked for this is launched for the first time, without it."""
        self._note(UNSTEERED, rid, intervention)

    def take(self) -> list[BudgetEvent]:
        """What happened since the last time."""
        events, self._events = self._events, []
        return events

    def status(self) -> dict[str, Any]:
        """For `GET /probe/status`."""
        return {
            "budget_ms": self._limit,
            "median_ms": round(self._median(), 6),
            "exceeded": self._since is not None,
            "over_budget": "refuse" if self.refuses else "off",
            "turned_away": self._turned_away,
        }

    def _median(self) -> float:
        return statistics.median(self._milliseconds) if self._milliseconds else 0.0

    def _note(self, event: str, rid: str | None = None, intervention: str | None = None) -> None:
        self._events.append(BudgetEvent(time.time(), event, self._median(), self._limit, rid, intervention))
