"""What the ledger says of facts that had to be dropped because the disk was slower than the server.

Positions of a dropped forward pass become spans of status `dropped`, joined per request, and go out with the next
commit that finds room. Ends of requests are kept as they are: they are few. Their prompts may be of any length, and are
kept as far as there is memory for them: nothing is known of the prompts of the others (null).
"""

from __future__ import annotations

from typing import Any

from sglang_probe.engine.ledger.facts import Commit
from sglang_probe.engine.live.stops import DiskTooSlow
from sglang_probe.run import schema

_AT = {name: schema.SPANS.get_field_index(name) for name in schema.SPANS.names}
_LIMIT = 200_000
_PROMPT_BYTES = 256 << 20


class Overflow:
    """Dropped facts that wait for a commit to travel with."""

    def __init__(self) -> None:
        self._waiting = Commit()
        self._open: dict[tuple[str, int], list[Any]] = {}
        self._prompt_bytes = 0
        self.forwards = 0

    def absorb(self, commit: Commit) -> None:
        """Take a commit that found no room.

        Raises:
            DiskTooSlow: the disk has been too slow for too long; memory is bounded, so the recording ends.
        """
        self.forwards += commit.forward is not None
        for fact in commit.spans:
            span = list(fact)
            span[_AT["status"]] = schema.DROPPED
            for name in ("tier", "origin_rid", "origin_attempt", "intervention"):
                span[_AT[name]] = None
            if span[_AT["phase"]] == schema.DECODE:
                span[_AT["phase"]] = None  # no longer one forward pass a position
            key = (span[_AT["rid"]], span[_AT["attempt"]])
            last = self._open.get(key)
            if (
                last is not None
                and last[_AT["end"]] == span[_AT["start"]]
                and last[_AT["phase"]] is None
                and span[_AT["phase"]] is None
            ):
                last[_AT["end"]] = span[_AT["end"]]
            else:
                self._open[key] = span
                self._waiting.spans.append(span)  # type: ignore[arg-type]
        self._waiting.rebinds += commit.rebinds
        self._waiting.tree += commit.tree
        self._waiting.requests += commit.requests
        for prompt in commit.prompts:
            if self._prompt_bytes + prompt.nbytes <= _PROMPT_BYTES:
                self._waiting.prompts.append(prompt)
                self._prompt_bytes += prompt.nbytes
        self._waiting.budget += commit.budget
        if self._facts > _LIMIT:
            raise DiskTooSlow(f"the disk did not take anything while {_LIMIT} facts had to be dropped")

    @property
    def _facts(self) -> int:
        w = self._waiting
        return len(w.spans) + len(w.rebinds) + len(w.tree) + len(w.requests)

    def release(self) -> Commit | None:
        """What is waiting, to be written; None if nothing is."""
        waiting, self._waiting, self._open, self._prompt_bytes = self._waiting, Commit(), {}, 0
        waiting.spans = [tuple(s) for s in waiting.spans]
        return waiting if waiting.spans or waiting.requests or waiting.rebinds or waiting.tree else None
