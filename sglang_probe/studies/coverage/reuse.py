"""What the ledger's lineage adds to coverage: which positions have an activation somewhere in the run, and how many
occurrences in traffic each computed position stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_probe.run import schema
from sglang_probe.run.columns import FATES, Spans, Traffic
from sglang_probe.studies.coverage.contexts import Trie

Array = np.ndarray[Any, Any]
Ranges = list[tuple[int, int]]

COMPUTED, REUSED = FATES.index(schema.COMPUTED), FATES.index(schema.REUSED)


@dataclass(frozen=True)
class Reuses:
    """Where computed positions are reused: from `position` of `request` on, `step` more (or fewer) requests do."""

    request: Array
    position: Array
    step: Array
    elsewhere: int
    """Reused positions whose origin is no position of the traffic: a retracted attempt, a discarded step, or before."""


def reuses_of(traffic: Traffic, spans: Spans) -> Reuses:
    """Reuse of positions of last attempts, as steps sorted by request and position."""
    count = len(traffic.end)
    last = np.zeros(count, dtype=np.int32)
    last[traffic.spans.request] = traffic.spans.attempt
    reused = traffic.spans.where(traffic.spans.fate == REUSED)
    known = (reused.origin >= 0) & (reused.origin < count)
    known &= np.where(known, last[np.where(known, reused.origin, 0)] == reused.origin_attempt, False)
    counted = reused.where(known)
    low = np.maximum(counted.start, traffic.begin[counted.origin])
    high = np.maximum(np.minimum(counted.end, traffic.end[counted.origin]), low)
    total = int((reused.end - reused.start).sum())
    request = np.concatenate([counted.origin, counted.origin])
    position = np.concatenate([low, high])
    step = np.concatenate([np.ones(len(low), dtype=np.int32), np.full(len(high), -1, dtype=np.int32)])
    order = np.argsort(request.astype(np.int64) << 32 | position, kind="stable")
    return Reuses(request[order], position[order], step[order], total - int((high - low).sum()))


def not_in_run(traffic: Traffic, spans: Spans) -> dict[int, Ranges]:
    """Positions of each request that were neither computed nor reused from something that this run computed.

    That is: dropped, unrequested, or reused from before the recording or from another segment of it.
    """
    attempts = 1 + int(max(spans.attempt.max(initial=0), spans.origin_attempt.max(initial=0)))

    def line(request: Array, attempt: Array) -> Array:
        return ((request.astype(np.int64) * attempts) + attempt) << 32

    computed = spans.where(spans.fate == COMPUTED)
    base = line(computed.request, computed.attempt)
    starts, ends = _merged(base + computed.start, base + computed.end)
    missing: dict[int, Ranges] = {}
    mine = traffic.spans
    asked = np.flatnonzero(mine.fate != COMPUTED)
    origin = np.where(mine.origin[asked] >= 0, line(mine.origin[asked], mine.origin_attempt[asked]), -1)
    low, high = origin + mine.start[asked], origin + mine.end[asked]
    at = np.searchsorted(starts, low, side="right") - 1
    inside = (origin >= 0) & (at >= 0) & (mine.fate[asked] == REUSED)
    inside &= ends[np.maximum(at, 0)] >= high if len(ends) else False
    for i in np.flatnonzero(~inside).tolist():
        span = int(asked[i])
        ranges = [(int(mine.start[span]), int(mine.end[span]))]
        if origin[i] >= 0 and mine.fate[span] == REUSED:
            first, behind = np.searchsorted(ends, low[i], side="right"), np.searchsorted(starts, high[i])
            have = np.stack([starts[first:behind], ends[first:behind]], axis=1) - origin[i]
            ranges = without(ranges, [(int(a), int(b)) for a, b in have])
        if ranges:
            missing.setdefault(int(mine.request[span]), []).extend(ranges)
    return missing


def never_in_run(missing: dict[int, Ranges], trie: Trie) -> dict[int, Ranges]:
    """Of the missing positions, those of first occurrences whose context no other request has in this run either."""
    missing = {request: list(ranges) for request, ranges in missing.items()}
    children = np.flatnonzero(np.isin(trie.parent, list(missing)))
    for child in children[::-1].tolist():  # later requests first: a parent is earlier than its children
        parent = int(trie.parent[child])
        has = without([(0, int(trie.new_from[child]))], missing.get(child, []))
        missing[parent] = without(missing[parent], has)
    own = {r: without(ranges, [(0, int(trie.new_from[r]))]) for r, ranges in missing.items()}
    return {r: ranges for r, ranges in own.items() if ranges}


def without(ranges: Ranges, removed: Ranges) -> Ranges:
    """`ranges` less `removed`; both sorted and disjoint."""
    out = []
    for a, b in ranges:
        for c, d in removed:
            if d <= a or c >= b:
                continue
            if c > a:
                out.append((a, c))
            a = max(a, d)
        if a < b:
            out.append((a, b))
    return out


def _merged(starts: Array, ends: Array) -> tuple[Array, Array]:
    """Touching intervals joined; sorted."""
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order]) if len(ends) else ends
    opens = np.ones(len(starts), dtype=bool)
    opens[1:] = starts[1:] > ends[:-1]
    first = np.flatnonzero(opens)
    return starts[first], ends[np.append(first[1:], len(starts)) - 1] if len(first) else ends
