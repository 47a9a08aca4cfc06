"""The lineage that a finished run holds, against the true owners that the slot oracle read from the device."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sglang_probe.run import schema
from sglang_probe.run.run import Run

Attempt = tuple[str, int]


def compare(run: Run, truths: Iterable[Path]) -> tuple[int, str | None]:
    """How many positions were compared, and the first that the run has wrong.

    Two questions of every attempt that ran: is every position that it reused written as `reused` with the request
    that computed it; and do the `rebinds` lead from there to the owners at its last forward pass.
    """
    reused, last = _truth(truths)
    written = _origins(run)
    compared = 0
    for key, true in reused.items():
        compared += len(true)
        if true != written.get(key, {}):
            wrong = sorted(true.items() ^ written.get(key, {}).items())[0]
            return compared, f"{key} position {wrong[0]}: {wrong[1]} is only true or only written as what it reused"
    rebinds = dict(iter(run.rebinds().groupby(["rid", "attempt"])))
    for key, (forward, owners) in last.items():
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


def _origins(run: Run) -> dict[Attempt, dict[int, Attempt]]:
    origins: dict[Attempt, dict[int, Attempt]] = {}
    spans = run.spans()
    for s in spans[spans["status"] == schema.REUSED].itertuples():
        known = isinstance(s.origin_rid, str)
        origin = (s.origin_rid, int(s.origin_attempt)) if known else ("", -1)
        origins.setdefault((s.rid, s.attempt), {}).update(dict.fromkeys(range(s.start, s.end), origin))
    return origins


def _truth(
    truths: Iterable[Path],
) -> tuple[dict[Attempt, dict[int, Attempt]], dict[Attempt, tuple[int, list[Attempt]]]]:
    reused: dict[Attempt, dict[int, Attempt]] = {}
    last: dict[Attempt, tuple[int, list[Attempt]]] = {}
    for path in truths:
        told: dict[str, Any] = json.loads(path.read_text())
        for rid, attempt, origin, origin_attempt, position in told["reused"]:
            reused.setdefault((rid, attempt), {})[position] = (origin, origin_attempt)
        for rid, attempt, forward, owners in told["last"]:
            last[rid, attempt] = (forward, [tuple(o) for o in owners])
    return reused, last
