"""The result of checking one invariant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """Result of one invariant: `violation` is None if it holds; `covered` says over how many `unit`s."""

    name: str
    claim: str
    covered: int
    unit: str
    violation: str | None = None
    note: str | None = None

    @property
    def holds(self) -> bool:
        return self.violation is None


def all_hold(checks: Mapping[str, Sequence[Check]]) -> bool:
    """Whether every invariant holds in every run, of checks by run."""
    return all(c.holds for of_run in checks.values() for c in of_run)
