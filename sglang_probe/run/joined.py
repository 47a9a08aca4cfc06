"""Several segments of one live recording as one run: what a question needs that looks further back than a segment.

A name in the ledger is given again once neither its segment nor the one before refers to it; where an earlier segment
of the join has it already, the later request is called `NAME@NUMBER`, with the number of its segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run import schema
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run, load_run

MOST = 32
"""Segments that are joined at most: the last ones."""
_CARRIED_ON = (schema.CONTINUES, schema.ENDED_EARLIER)


def joined_or_one(path: Path) -> Run:
    """A run directory; or, of the folder of a live recording, its closed segments (`last_process`) as one run."""
    if (path / MANIFEST).exists() or not any(path.glob(f"segment-*/{MANIFEST}")):
        return load_run(path)
    closed = [p for p in last_process(path) if (p / REQUESTS_FILE).exists()]
    if not closed:
        raise RunDirectoryError(f"{path} has no closed segment", fix="POST /probe/flush closes the current one")
    return Joined(path, closed[-MOST:])


def last_process(root: Path) -> list[Path]:
    """Segments of the last server process that recorded into a folder, in order: those before it are of other keys and
    another cache."""
    paths = sorted(p.parent for p in root.glob(f"segment-*/{MANIFEST}"))
    first = [i for i, p in enumerate(paths) if load_run(p).manifest["segment"]["first_of_process"]]
    return paths[first[-1] if first else 0 :]


class Joined(Run):
    """Segments that follow each other: their requests, spans, forwards, tree and prompts as one table each; rows and
    the other tables are those of a segment. Manifest and settings are those of the last, which may still be recorded:
    then requests that are in flight have no row, and nothing is known of their prompts.

    Raises (on construction):
        RunDirectoryError: one is no run.
    """

    def __init__(self, root: Path, segments: Sequence[Path]) -> None:
        super().__init__(segments[-1])
        self.path = root
        self.segments = [load_run(p) for p in segments]
        number = self.segments[0].manifest["segment"]["number"]
        self.manifest = {**self.manifest, "segment": {**self.manifest["segment"], "number": number}}
        self._requests = [_requests(run) for run in self.segments]
        self._names = _names(self.segments, self._requests)

    def requests(self, *, interrupted: bool = False) -> pd.DataFrame:
        """As of one run; a request that went on in a later segment once."""
        frames = [
            self._named(frame[~frame["finish_reason"].isin(_CARRIED_ON)], k) for k, frame in enumerate(self._requests)
        ]
        last = self._named(self._requests[-1], -1)
        left = last[last["finish_reason"] == schema.CONTINUES]
        frame = pd.concat([*frames, left], ignore_index=True).drop_duplicates("rid", ignore_index=True)
        return frame if interrupted else frame[frame["finish_reason"] != schema.INTERRUPTED].reset_index(drop=True)

    def spans(self) -> pd.DataFrame:
        return self._all(lambda run: run.spans())

    def forwards(self) -> pd.DataFrame:
        return self._all(lambda run: run.forwards())

    def tree(self) -> pd.DataFrame:
        return self._all(lambda run: run.tree())

    def prompts(self) -> pd.DataFrame:
        return self._all(lambda run: run.prompts())

    def _all(self, table: Callable[[Run], pd.DataFrame]) -> pd.DataFrame:
        frames = [self._named(table(run), k) for k, run in enumerate(self.segments)]
        return pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)

    def _named(self, frame: pd.DataFrame, k: int) -> pd.DataFrame:
        other = self._names[k]
        if not other or "rid" not in frame:
            return frame
        return frame.assign(rid=frame["rid"].map(lambda rid: other.get(rid, rid)))


def _requests(run: Run) -> pd.DataFrame:
    """Of a segment that is still recorded, those that have ended so far."""
    if (run.path / REQUESTS_FILE).exists():
        return run.requests(interrupted=True)
    ended, prompts = run.engine_requests(), run.prompts()
    told = prompts[["rid", "prompt_ids", "prompt_hash"]].drop_duplicates("rid")
    frame = ended.merge(told, on="rid", how="left")
    segments = [[{"name": "prompt", "start": 0, "end": int(n)}] for n in frame["prompt_len"]]
    frame = frame.reindex(columns=schema.LIVE_REQUESTS.names).assign(segments=segments).astype(object)
    return frame.where(frame.notna(), None)


def _names(segments: Sequence[Run], requests: Sequence[pd.DataFrame]) -> list[dict[str, str]]:
    """Of each segment, what the requests are called here that have the name of another."""
    ended: set[str] = set()
    going: dict[str, str] = {}  # those that reach into the next segment, and what they are called here
    out = []
    for run, frame in zip(segments, requests, strict=True):
        carried: dict[str, Any] = run.manifest["segment"]["carried_in"]
        other: dict[str, str] = {}
        for rid in frame["rid"]:
            if rid in carried and rid in going:
                other[rid] = going[rid]
            elif rid in ended:
                other[rid] = f"{rid}@{run.manifest['segment']['number']}"
        going = {rid: other.get(rid, rid) for rid in frame["rid"]}
        ended |= {rid for rid, why in zip(frame["rid"], frame["finish_reason"], strict=True) if why != schema.CONTINUES}
        out.append({rid: name for rid, name in other.items() if name != rid})
    return out
