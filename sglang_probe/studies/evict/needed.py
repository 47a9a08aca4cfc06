"""Which positions the answers of a study need, found by removal: `needed.parquet`, and what its cells are read as."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sglang_probe.eviction.needed import Found, Score, Segment, find_needed
from sglang_probe.eviction.protocol import Protocol
from sglang_probe.workload.request import Request, Truth

if TYPE_CHECKING:
    from sglang_probe.eviction.removal import RemovalModel
    from sglang_probe.harvest.prepare import Prepared
    from sglang_probe.harvest.progress import Reporter

NEEDED_FILE = "needed.parquet"
COLUMNS = [
    *("task", "protocol", "rid", "segment", "start", "end", "drop", "breaks", "control_drop", "control_breaks"),
    *("right", "log_likelihood", "removals"),
]
"""One row for each range that an answer needs, and one without a range (`start` -1) for an answer that needs none."""

Positions = Mapping[tuple[str, Protocol], Sequence[int]]
"""Needed positions by request and protocol."""


def record_needed(
    prepared: Mapping[str, Prepared],
    protocols: Sequence[Protocol],
    sinks: int,
    folder: Path,
    reporter: Reporter,
    *,
    seed: int,
) -> None:
    """Search for the needed positions of every request, and write them.

    Args:
        sinks: first positions that are removed as a piece of their own.

    Raises:
        UnsupportedError: as `RemovalModel`.
    """
    from sglang_probe.eviction.removal import RemovalModel

    rows: list[dict[str, Any]] = []
    for task, ours in prepared.items():
        model = RemovalModel(ours.model.path)
        requests = ours.workload.requests
        with reporter.requests(f"{task}: needed positions", len(requests)) as counter:
            for r in requests:
                assert r.truth is not None
                for protocol, score in scores_of(model, r.truth, protocols).items():
                    length = len(r.prompt_ids) if protocol is Protocol.QUERY_VISIBLE else r.truth.context_len
                    found = find_needed(score, segments_of(r, length, sinks), seed=seed + r.index)
                    rows += _rows(task, protocol, r.rid, found)
                counter.advance(0)
    pd.DataFrame(rows, columns=COLUMNS).to_parquet(folder / NEEDED_FILE)


def scores_of(model: RemovalModel, truth: Truth, protocols: Sequence[Protocol]) -> dict[Protocol, Score]:
    """What scores a request that knows its right answer."""
    return model.scores(
        truth.prompt_ids, truth.continuation_ids, truth.answer_steps, protocols, context=truth.context_len
    )


def segments_of(request: Request, length: int, sinks: int) -> list[Segment]:
    """The segments of a prompt before `length`; its first positions apart."""
    out = [Segment("sinks", 0, min(sinks, length))] if sinks else []
    for s in request.spans:
        start, end = max(s.start, sinks), min(s.end, length)
        if start < end:
            out.append(Segment(s.name, start, end))
    return out


def read_needed(folder: Path, task: str) -> Positions | None:
    """Needed positions of a task's requests; None: they were not looked for."""
    if not (folder / NEEDED_FILE).exists():
        return None
    frame = pd.read_parquet(folder / NEEDED_FILE)
    return _positions(frame[frame["task"] == task].itertuples())


def needed_summary(frame: pd.DataFrame) -> pd.DataFrame:
    """By task and protocol: prompts, share answered right, positions needed, and what their removal does.

    Columns: task, protocol, prompts, right; positions, ranges (means over prompts); `breaks` and `control_breaks`, the
    share of ranges whose removal makes a right answer wrong, and that of as many random positions; `drop` and
    `control_drop`, the medians over ranges in nats.
    """
    out = []
    for (task, protocol), mine in frame.groupby(["task", "protocol"], sort=False):
        ranges = mine[mine["start"] >= 0]
        prompts = mine.drop_duplicates("rid")
        right = ranges[ranges["right"]]
        out.append(
            {
                "task": task,
                "protocol": protocol,
                "prompts": len(prompts),
                "right": prompts["right"].mean(),
                "ranges": len(ranges) / len(prompts),
                "positions": (ranges["end"] - ranges["start"]).sum() / len(prompts),
                "breaks": right["breaks"].mean(),
                "control_breaks": right["control_breaks"].mean(),
                "drop": ranges["drop"].median(),
                "control_drop": ranges["control_drop"].median(),
            }
        )
    return pd.DataFrame(out)


def mask(needed: Positions, rids: Sequence[str], protocol: Protocol, length: int) -> np.ndarray[Any, Any]:
    """Bool `[B, L]`."""
    out = np.zeros((len(rids), length), dtype=bool)
    for i, rid in enumerate(rids):
        out[i, list(needed.get((rid, protocol), ()))] = True
    return out


def _rows(task: str, protocol: Protocol, rid: str, found: Found) -> Iterable[dict[str, Any]]:
    about: dict[str, Any] = {"task": task, "protocol": protocol.value, "rid": rid, "right": found.whole.right}
    about |= {"log_likelihood": found.whole.log_likelihood, "removals": found.removals}
    if not found.needed:
        nothing: dict[str, Any] = {"segment": "", "start": -1, "end": -1, "drop": np.nan, "control_drop": np.nan}
        return [{**about, **nothing, "breaks": False, "control_breaks": False}]
    return [{**about, **vars(n)} for n in found.needed]


def _positions(rows: Iterable[Any]) -> dict[tuple[str, Protocol], list[int]]:
    out: dict[tuple[str, Protocol], list[int]] = {}
    for r in rows:
        mine = out.setdefault((str(r.rid), Protocol(r.protocol)), [])
        if r.start >= 0:
            mine += range(int(r.start), int(r.end))
    return out
