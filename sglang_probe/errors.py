"""The errors users see. Each message says what happened and where; `fix` says what to do about it."""

from __future__ import annotations

from typing import Self


class ProbeError(Exception):
    """Base of all errors raised on purpose. `str()` gives the message, then the advice on its own line."""

    def __init__(self, message: str, *, fix: str | None = None, reason: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix
        self.reason = reason
        """Class of a refusal of one record of a workload, e.g. `too long`: what skipped records are counted by."""

    def at(self, place: str) -> Self:
        """The same error, with its place in front."""
        return type(self)(f"{place}: {self.message}", fix=self.fix, reason=self.reason)

    def __str__(self) -> str:
        return self.message if self.fix is None else f"{self.message}\n  to fix: {self.fix}"


class ConfigError(ProbeError):
    """A YAML file or an option is wrong."""


class WorkloadError(ProbeError):
    """A workload cannot be read or rendered."""


class InventoryError(ProbeError):
    """The installed SGLang is missing, unknown, or changed where the probe would touch it."""


class UnsupportedError(ProbeError):
    """The engine was asked for something whose accounting is not proved; the probe refuses to guess."""


class RunDirectoryError(ProbeError):
    """A run directory exists already, is incomplete, or cannot be read."""


class LedgerError(ProbeError):
    """An invariant of the ledger does not hold."""
