"""What the radix tree took and gave, against the spans and rebinds that follow from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.verify import segment
from sglang_probe.verify.check import Check
from sglang_probe.verify.frames import is_step

Key = tuple[str, int]
_KINDS = {schema.OPENED, schema.PUBLISHED, schema.MATCHED, schema.EVICTED, schema.FLUSHED}


def has_tree(run: Run) -> bool:
    """Whether the run was recorded with what the tree did."""
    return not run.tree().empty


def tree_fits(run: Run) -> Check:
    """Each attempt was given by the tree what it reuses, each origin had published before, and each rebind is one of a
    publication."""
    name, claim = "tree", "the tree gave what is reused, of what was published before, and rebinds follow publications"
    tree, spans, rebinds = run.tree(), run.spans(), run.rebinds()
    violation = None
    for rank, events in tree.groupby("dp_rank"):
        own = spans[spans["dp_rank"] == rank]
        told = _Told(events, own, partial=segment.of(run) is not None or bool((own["status"] == schema.DROPPED).any()))
        faults = (
            *(told.cells(), told.matches(), told.publications(), told.origins()),
            told.rebinds(rebinds[rebinds["dp_rank"] == rank]),
        )
        violation = violation or next((f for of in faults for f in of), None)
    return Check(name, claim, len(tree), "events", violation)


class _Told:
    """One rank's events and spans; each method names what does not fit."""

    def __init__(self, events: pd.DataFrame, spans: pd.DataFrame, *, partial: bool) -> None:
        self._events, self._partial = events, partial
        """Whether other segments, or dropped facts, may hold what is not here."""
        self._computed: dict[Key, list[Any]] = {}
        self._reused: dict[Key, list[Any]] = {}
        steps = is_step(spans)
        for s, step in zip(spans.itertuples(), steps, strict=True):
            if s.status == schema.COMPUTED:
                self._computed.setdefault((str(s.rid), int(s.attempt)), []).append((s, bool(step)))
            elif s.status == schema.REUSED:
                self._reused.setdefault((str(s.rid), int(s.attempt)), []).append(s)
        self._published: dict[Key, list[Any]] = {}
        for e in events[(events["event"] == schema.PUBLISHED) & events["rid"].notna()].itertuples():
            if not (pd.isna(e.attempt) or pd.isna(e.start) or pd.isna(e.end)):
                self._published.setdefault((str(e.rid), int(e.attempt)), []).append(e)

    def cells(self) -> Iterator[str]:
        """Kinds, orders, and what an event of its kind says."""
        events = self._events
        epoch = (events["event"] == schema.OPENED).cumsum()
        if (twice := pd.DataFrame({"e": epoch, "o": events["order"]}).duplicated()).any():
            yield f"two events of the tree have the number {events['order'][twice].iloc[0]}"
        if (events["order"] < 0).any() or (events["at_forward"] < 0).any():
            yield "an event of the tree has a number below 0"
        if ((events["event"] == schema.OPENED) != (events["order"] == 0)).any():
            yield "an event of the tree has number 0, or `opened` has another"
        if not self._partial and events["event"].iloc[0] != schema.OPENED:
            yield "the events of the tree do not begin with `opened`"
        for e in events.itertuples():
            if e.event not in _KINDS:
                yield f"the tree has no event `{e.event}`"
            entries = e.event in (schema.PUBLISHED, schema.MATCHED)
            if entries != (not pd.isna(e.end)) or entries != (not pd.isna(e.start)):
                yield f"event {e.order} of the tree, `{e.event}`, is of positions {e.start} to {e.end}"
            if entries and not 0 <= e.start <= e.end:
                yield f"event {e.order} of the tree is of positions {e.start} to {e.end}"
            if e.event == schema.MATCHED and (not isinstance(e.rid, str) or pd.isna(e.attempt) or e.start):
                yield f"event {e.order} of the tree matches nobody's prefix"
            if not entries and (isinstance(e.rid, str) or not pd.isna(e.attempt)):
                yield f"event {e.order} of the tree, `{e.event}`, is of request {e.rid}"
            if e.event == schema.EVICTED and not e.tokens > 0:
                yield f"event {e.order} of the tree evicted {e.tokens} tokens"

    def matches(self) -> Iterator[str]:
        """Each attempt was matched once, by the forward that computed its first chunk, and reuses what it was given."""
        matched = self._events[self._events["event"] == schema.MATCHED]
        seen: set[Key] = set()
        for e in matched.itertuples():
            key = (str(e.rid), int(e.attempt))
            if key in seen:
                yield f"{e.rid} (attempt {e.attempt}) was matched twice"
            seen.add(key)
            first = min((s for s, step in self._computed.get(key, []) if not step), key=_start, default=None)
            if first is None:
                if not self._partial:
                    yield f"the tree matched {e.rid} (attempt {e.attempt}), of which nothing was computed"
                continue
            if first.forward_id != e.at_forward:
                yield f"{e.rid} was matched for forward {e.at_forward}, and first computed by {first.forward_id}"
            given = max((int(s.end) for s in self._reused.get(key, [])), default=0)
            if given != e.end:
                yield f"the tree gave {e.rid} (attempt {e.attempt}) {e.end} positions, and it reused {given}"
        for key, computed in self._computed.items():
            starts = [int(s.start) for s, _ in computed] + [int(s.start) for s in self._reused.get(key, [])]
            if key not in seen and min(starts) == 0 and not self._partial:
                yield f"{key[0]} (attempt {key[1]}) was computed, and the tree was never asked for its prefix"

    def publications(self) -> Iterator[str]:
        """Nothing was published before it was computed or reused."""
        for key, events in self._published.items():
            held = self._computed.get(key, [])
            for e in events:
                have = max((int(s.end) for s, _ in held), default=0)
                if not held and not self._partial:
                    yield f"{e.rid} (attempt {e.attempt}) published, and nothing of it was computed"
                elif held and e.end > have and not self._partial:
                    yield f"{e.rid} published {e.end} positions, and has {have}"
                for s, step in held:
                    if s.start < e.end:
                        last = int(s.forward_id) + ((min(int(s.end), int(e.end)) - 1 - int(s.start)) if step else 0)
                        if last >= e.at_forward:
                            yield f"{e.rid} published position {e.end - 1} before forward {last} computed it"

    def origins(self) -> Iterator[str]:
        """What is reused was published by its origin, before."""
        for spans in self._reused.values():
            for s in spans:
                origin = (str(s.origin_rid), -1 if pd.isna(s.origin_attempt) else int(s.origin_attempt))
                if not isinstance(s.origin_rid, str) or (self._partial and origin not in self._published):
                    continue
                at = int(s.start)
                for e in sorted(self._published.get(origin, []), key=_start):
                    if e.at_forward <= s.forward_id and e.start <= at:
                        at = max(at, int(e.end))
                if at < s.end and not self._partial:
                    yield f"{s.rid} reuses position {at} of {s.origin_rid}, which had not published it as new"

    def rebinds(self, rebinds: pd.DataFrame) -> Iterator[str]:
        """A rebind is of what the tree had already when its request published."""
        for r in rebinds.itertuples():
            events = self._published.get((str(r.rid), int(r.attempt)), [])
            if not any(e.at_forward == r.at_forward and r.end <= e.start for e in events) and not self._partial:
                yield f"{r.rid} was rebound at forward {r.at_forward}, and published nothing then"


def _start(of: Any) -> int:
    return int(of.start)
