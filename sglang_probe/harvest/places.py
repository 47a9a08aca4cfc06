"""Processes for replicas, on whatever machines: what `harvest/replicas.py` needs to know of them."""

from __future__ import annotations

from typing import Any, Protocol

from sglang_probe.harvest.replica import EngineArguments, Told


class Lost(Exception):
    """The process of a replica, or its machine, is gone. The message says what is known of it."""


class Place(Protocol):
    """A process with a `Replica` in it."""

    async def call(self, method: str, *args: Any) -> Told:
        """Call a method of the replica.

        Raises:
            Lost: the process is gone.
        """

    def end(self) -> None:
        """End the process, if it is still there."""


class Places(Protocol):
    """Where processes can be had."""

    def place(self, rank: int, arguments: EngineArguments) -> Place:
        """A process for a replica. It is not started again by itself: who asked for it decides what it does.

        Raises:
            Lost: none can be had any more.
        """

    def close(self) -> None:
        """None is needed any more."""
