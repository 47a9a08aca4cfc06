"""Causes of a segment of a live recording, closed or not, for the server that records it: counts, and no text.

Run as a process of its own at the lowest priority (`python -m sglang_probe.studies.why.live`, JSON in and out), so that
the server's processes neither compute nor wait for it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.errors import ProbeError, RunDirectoryError
from sglang_probe.run.causes import Autopsy, Cause, autopsy
from sglang_probe.run.joined import Joined, last_process
from sglang_probe.studies.why.differ import Difference
from sglang_probe.studies.why.study import REMEDIES, groups_of

CONTEXT = 4
"""Segments that are looked at: the one in question, and those before it."""

MEMORY = 8 << 30
"""Bytes of address space that the process may take, libraries and all."""


def causes_of(segment: Path, *, by: str = "session", rid: str | None = None) -> dict[str, Any]:
    """Causes of what the prefills of one segment computed, as far as it is on disk.

    Args:
        by: label or axis by which they are grouped, or `family`, `rid`.
        rid: tell of this request alone, and of each run of its positions.

    Raises:
        RunDirectoryError: the recording does not say why, or there is no such request, or its end is not on disk yet.
    """
    paths = [p for p in last_process(segment.parent) if p.name <= segment.name]
    if not paths or paths[-1] != segment:
        raise RunDirectoryError(f"{segment} is no segment of the last recording there", fix="ask again")
    run = Joined(segment.parent, paths[-CONTEXT:])
    newest = run.segments[-1].forwards()["forward_id"]
    ended = run.requests(interrupted=True)
    found = autopsy(run)
    pieces = found.pieces[found.pieces["forward_id"] >= (newest.min() if len(newest) else 1 << 62)]
    if rid is not None and (pieces := pieces[pieces["rid"] == rid]).empty:
        raise RunDirectoryError(f"{segment.name} has no prompt of `{rid}` that was computed")
    if rid is not None and (pieces["cause"] == str(Cause.UNKNOWN)).all() and rid not in set(ended["rid"]):
        raise RunDirectoryError(
            f"{segment.name} does not hold the end of `{rid}` yet, and its prompt is written then",
            fix="ask again once it has ended and `checkpoint_seconds` have passed",
        )
    pieces = pieces.assign(tokens=pieces["end"] - pieces["start"])
    told: dict[str, Any] = {
        "segment": segment.name,
        "computed": int(pieces["tokens"].sum()),
        "causes": Autopsy(pieces, found.text_known).by_cause(),
        "remedies": {c: r for c in pieces["cause"].unique() if (r := _remedy(c)) is not None},
    }
    if rid is not None:
        columns = ["attempt", "start", "end", "cause", "nearest", "common"]
        told["positions"] = json.loads(pieces[columns].to_json(orient="records"))
    else:
        group = pieces["rid"].map(_groups(run, ended, by)).fillna("(none)")
        told["by"] = by
        told["groups"] = [
            {"group": name, "causes": {str(k): int(n) for k, n in own.items()}}
            for name, own in (
                (str(name), part.groupby("cause")["tokens"].sum()) for name, part in pieces.groupby(group, sort=False)
            )
        ]
    return told


def _groups(run: Joined, requests: pd.DataFrame, by: str) -> dict[str, str]:
    try:
        return dict(groups_of(requests, run.tree(), by, run.path))
    except RunDirectoryError:
        return {}  # nobody has carried that label yet


def _remedy(cause: str) -> str | None:
    """Which of the remedies of a divergence is meant is told by the texts, and these are not read here."""
    return REMEDIES.get(f"{Cause.DIVERGED}: {Difference.TEXT}" if cause == Cause.DIVERGED else cause)


def main() -> None:
    """Answer one question: `{"segment": PATH, "by": "session", "rid": null}`."""
    os.nice(19)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    asked = json.load(sys.stdin)
    try:
        told = causes_of(Path(asked["segment"]), by=asked.get("by") or "session", rid=asked.get("rid"))
    except ProbeError as e:
        told = {"reason": e.message, "fix": e.fix}
    except MemoryError:
        fix = "ask `sglang-probe why` about the closed segment, or make segments smaller: `live: {segments: {...}}`"
        told = {"reason": f"finding the causes took more than {MEMORY / 1e9:.1f} GB of address space", "fix": fix}
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
