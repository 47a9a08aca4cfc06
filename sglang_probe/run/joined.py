"""Several segments of one live recording as one run: what a question needs that looks further back than a segment.

A name in the ledger is given again once neither its segment nor the one before has a request of it; where an earlier
segment of the join has it already, the later request is called `NAME@NUMBER`, with the number of its segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

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
    """Segments that follow each other: their requests, spans, forwards, tree and prompts as one table each. Everything
    else (rows, tokens, samples, further tables) is of a segment, and is refused. Manifest and settings are those of
    the last, which may still be recorded: then requests that are in flight have no row, and nothing is known of their
    prompts.

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

    def parts(self) -> NoReturn:
        """Refused, and with it rows and every table that is not joined: rows are numbered anew in each segment.

        Raises:
            RunDirectoryError: always.
        """
        one = self.segments[-1].path
        raise RunDirectoryError(
            f"{self.path} is a recording of several segments, and rows, tokens and samples are of one",
            fix=f"give a segment, e.g. {one}",
        )

    def tokens(self, *, interrupted: bool = False) -> NoReturn:
        """As `parts`."""
        self.parts()

    def requests_table(self, columns: Sequence[str]) -> NoReturn:
        """As `parts`."""
        self.parts()

    def tokens_of(self, rid: str) -> NoReturn:
        """As `parts`."""
        self.parts()

    def samples(self, *args: Any, **kwargs: Any) -> NoReturn:
        """As `parts`."""
        self.parts()

    def _all(self, table: Callable[[Run], pd.DataFrame]) -> pd.DataFrame:
        frames = [self._named(table(run), k) for k, run in enumerate(self.segments)]
        return pd.concat([f for f in frames if len(f)] or frames[:1], ignore_index=True)

    def _named(self, frame: pd.DataFrame, k: int) -> pd.DataFrame:
        names = self._names[k]
        found = frame
        if names.here and "rid" in frame:
            found = found.assign(rid=frame["rid"].map(lambda rid: names.here.get(rid, rid)))
        if (names.here or names.former) and "origin_rid" in frame:
            pairs = zip(frame["origin_rid"], frame["forward_id"], strict=True)
            found = found.assign(origin_rid=pd.Series([names.origin(*p) for p in pairs], frame.index, object))
        return found


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


@dataclass(frozen=True, slots=True)
class _Names:
    """What the requests of a segment are called here, as far as that is another name."""

    here: dict[str, str] = field(default_factory=dict)
    former: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Of a name that is given again in this segment: the first forward of the new request, and what the one before,
    whose entries were still reused until then, is called."""

    def origin(self, rid: str | None, forward: int) -> str | None:
        """Of the request that a span's entries are from."""
        if rid in self.former and forward < self.former[rid][0]:
            return self.former[rid][1]
        return rid if rid is None else self.here.get(rid, rid)


def _names(segments: Sequence[Run], requests: Sequence[pd.DataFrame]) -> list[_Names]:
    """A name is the same request's where it was carried in, or where a request of it was in flight in the segment
    before: `sglang_probe.engine.live.names` does not give it again then. What that segment had of a request that had
    already ended (`ENDED_EARLIER`, its last events) does not count.
    """
    latest: dict[str, str] = {}
    before: set[str] = set()
    out = []
    for run, frame in zip(segments, requests, strict=True):
        segment, spans = run.manifest["segment"], run.spans()
        tables = (frame["rid"], spans["rid"], run.prompts()["rid"], run.tree()["rid"])
        own = {*segment["carried_in"], *_told(tables)}
        former, left_over = {}, set(frame["rid"][frame["finish_reason"] == schema.ENDED_EARLIER])
        for rid in own - set(segment["carried_in"]):
            if rid in before:
                left_over.add(rid)
            elif rid in latest:
                first = spans["forward_id"][spans["rid"] == rid].min()
                former[rid] = (1 << 62 if pd.isna(first) else int(first), latest[rid])  # NaN: it has no span yet
                latest[rid] = f"{rid}@{segment['number']}"
        named = own | set(_told([spans["origin_rid"]]))  # an origin may be of before the first segment
        latest |= {rid: rid for rid in named - latest.keys()}
        before = own - left_over
        out.append(_Names({rid: latest[rid] for rid in named if latest[rid] != rid}, former))
    return out


def _told(columns: Iterable[pd.Series]) -> Iterator[str]:
    for column in columns:
        yield from column.dropna().unique()
