"""The lineage of a recording against the true owners of KV slots that the engine's instrument `slot_truth` read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_probe.run import schema
from sglang_probe.run.run import Run

Attempt = tuple[str, int]
NOBODY: Attempt = ("", -1)
"""Owner of what was not written in the recording."""


@dataclass
class Owners:
    """The reports of all data-parallel ranks."""

    compared: int = 0
    """Positions that forwards attended to, each time."""
    wrong: int = 0
    unknown: int = 0
    """Positions of which the lineage did not know the owner."""
    forwards: int = 0
    first: str | None = None
    """What was wrong first."""
    reused: dict[Attempt, dict[int, Attempt]] = field(default_factory=dict)
    """Of each attempt, the owners of the positions that it did not compute."""
    last: dict[Attempt, tuple[int, list[Attempt]]] = field(default_factory=dict)
    """Of each attempt, its last forward pass and the owners of what it attended to."""

    @property
    def violation(self) -> str | None:
        """What is wrong, in words."""
        if self.wrong or self.unknown:
            return f"{self.wrong} wrong, {self.unknown} unknown; {self.first}"
        return None


def read_owners(truth: Path) -> Owners:
    """Sum the reports at `<truth>.<rank>.json`. A recording that stopped at once leaves none."""
    found = Owners()
    for path in sorted(truth.parent.glob(f"{truth.name}.*.json")):
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in ("compared", "wrong", "unknown", "forwards"):
            setattr(found, name, getattr(found, name) + told[name])
        found.first = found.first or told["first"]
        attempts = [(str(rid), int(attempt)) for rid, attempt in told.get("attempts", ())]

        def named(number: int, attempts: list[Attempt] = attempts) -> Attempt:
            return NOBODY if number < 0 else attempts[number]

        for number, positions, owners in told.get("reused", ()):
            found.reused[named(number)] = {p: named(o) for p, o in zip(positions, owners, strict=True)}
        for number, forward, owners in told.get("last", ()):
            found.last[named(number)] = (forward, [named(o) for o in owners])
    return found


def compare(run: Run, true: Owners) -> tuple[int, str | None]:
    """How many positions of a finished run were compared, and the first that it has wrong.

    Two questions of every attempt that ran: is every position that it reused written as `reused` with the request
    that computed it; and do the `rebinds` lead from there to the owners at its last forward pass.
    """
    written = _origins(run)
    compared = 0
    for key in true.last:
        reused = true.reused.get(key, {})
        compared += len(reused)
        if reused != written.get(key, {}):
            wrong = sorted(reused.items() ^ written.get(key, {}).items())[0]
            return compared, f"{key} position {wrong[0]}: {wrong[1]} is only true or only written as what it reused"
    rebinds = dict(iter(run.rebinds().groupby(["rid", "attempt"])))
    for key, (forward, owners) in true.last.items():
        now = [written.get(key, {}).get(p, key) for p in range(len(owners))]
        for r in rebinds[key].itertuples() if key in rebinds else ():
            if r.at_forward <= forward:
                end = min(r.end, len(now))
                now[r.start : end] = [(r.origin_rid, r.origin_attempt)] * max(0, end - r.start)
        compared += len(owners)
        for position, (true_owner, written_owner) in enumerate(zip(owners, now, strict=True)):
            if true_owner != written_owner:
                return (
                    compared,
                    f"{key} position {position} at forward {forward}: {true_owner}, written {written_owner}",
                )
    return compared, None


def unended(run: Run, rids: Iterable[str]) -> list[str]:
    """Requests of which the engine never said that they ended; samples of a request are named after it."""
    ended = {rid.partition("~")[0] for rid in run.engine_requests()["rid"]}
    return sorted(set(rids) - ended)


def _origins(run: Run) -> dict[Attempt, dict[int, Attempt]]:
    origins: dict[Attempt, dict[int, Attempt]] = {}
    spans = run.spans()
    for s in spans[spans["status"] == schema.REUSED].itertuples():
        origin = (s.origin_rid, int(s.origin_attempt)) if isinstance(s.origin_rid, str) else NOBODY
        origins.setdefault((s.rid, s.attempt), {}).update(dict.fromkeys(range(s.start, s.end), origin))
    return origins
