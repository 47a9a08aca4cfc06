"""What a run tells of its schedule: what each forward computed, and when each request let go of its entries.

The latter is not recorded. It follows from where SGLang lets a request go: at its end, while it makes up a decode, or
at a pause.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.run import schema

Computed = tuple[tuple[str, int], int, bool]
"""A request of a forward, by rid and attempt; up to where it is computed, and whether that is a step of its output."""


def uncut(tree: pd.DataFrame, spans: pd.DataFrame, page: int) -> pd.Series:
    """`end` of each event, and of a publication what was published before it was cut to whole pages: the end of a
    chunk, of the prompt, or of the request."""
    done = spans[(spans["status"] == schema.COMPUTED) & (spans["phase"] != schema.OVERSHOOT)]
    ends: dict[tuple[str, int], list[int]] = {
        (str(rid), int(attempt)): sorted(of.tolist()) for (rid, attempt), of in done.groupby(["rid", "attempt"])["end"]
    }
    out = tree["end"].copy()
    for e in tree[(tree["event"] == schema.PUBLISHED) & tree["rid"].notna()].itertuples():
        at = int(e.end)
        whole = next((n for n in ends.get((str(e.rid), int(e.attempt)), ()) if at <= n < at + page), at)
        out.loc[e.Index] = whole
    return out


def computed_by(spans: pd.DataFrame) -> dict[int, list[Computed]]:
    """Of each forward, what it computes."""
    out: dict[int, list[Computed]] = {}
    for s in spans[spans["status"] == schema.COMPUTED].itertuples():
        key = (str(s.rid), int(s.attempt))
        if s.phase in schema.STEP_PHASES:
            for i in range(int(s.end) - int(s.start)):
                out.setdefault(int(s.forward_id) + i, []).append((key, int(s.start) + i + 1, True))
        else:
            out.setdefault(int(s.forward_id), []).append((key, int(s.end), False))
    return out


def leaving(
    tree: pd.DataFrame,
    computing: dict[int, list[Computed]],
    decodes: Sequence[int],
    retractions: Mapping[str, int],
) -> dict[Any, Any]:
    """After which event of the tree, or which forward, each attempt is gone; and before which it is retracted.

    Args:
        decodes: forwards that decode and do nothing else.
        retractions: of each request that ended; after the last it may have been aborted before it began again.
    """
    used: dict[tuple[str, int], tuple[int, int]] = {}
    for forward in sorted(computing):
        for row, (key, _, _) in enumerate(computing[forward]):
            used[key] = forward, row
    epoch = (tree["event"] == schema.OPENED).cumsum().to_numpy(np.int64)
    tree = tree.assign(order=tree["order"] + epoch * (1 << 40)).sort_values("order", kind="stable")
    matched = tree[tree["event"] == schema.MATCHED]
    begins = {(str(e.rid), int(e.attempt)): int(e.at_forward) for e in matched.itertuples()}
    published = tree[(tree["event"] == schema.PUBLISHED) & tree["rid"].notna()]
    published = published.drop_duplicates(["rid", "attempt"], keep="last")
    after = {(str(e.rid), int(e.attempt)): (int(e.at_forward), int(e.order)) for e in published.itertuples()}
    out: dict[Any, Any] = {}
    paused: list[tuple[int, int, int, tuple[str, int]]] = []
    for key, (forward, row) in used.items():
        again = begins.get((key[0], key[1] + 1), _NEVER)
        if key[1] < retractions.get(key[0], 0) or again < _NEVER:
            # SGLang retracts while it makes up a decode (`update_running_batch`); it does not between a request's last
            # forward and its next attempt where that is a pause, which retracts all (`pause_generation`).
            follows = bisect.bisect_right(decodes, forward)
            if follows < len(decodes) and decodes[follows] < again:
                out.setdefault(("before", decodes[follows]), []).append(key)
            elif again == _NEVER or again <= forward:  # or the run is not as SGLang makes them
                out.setdefault(("forward", forward), []).append(key)
            else:
                paused.append((again, forward, row, key))
            continue
        at, order = after.get(key, (-1, -1))
        if at > forward:  # its end published it
            out["order", order] = key
        else:
            out.setdefault(("forward", forward), []).append(key)
    for together in _pauses(paused):
        last = max(forward for _, forward, _, _ in together)
        order = int(matched.loc[matched["at_forward"] > last, "order"].iloc[0])
        out["pause", order] = [key for *_, key in sorted(together, key=lambda p: p[1:3])]
    return out


_NEVER = 1 << 62


def _pauses(paused: Sequence[tuple[int, int, int, tuple[str, int]]]) -> Iterator[list[Any]]:
    """Requests of one pause each: those that had been in a forward before the first of them began again."""
    waiting = sorted(paused)
    while waiting:
        first = waiting[0][0]
        yield [p for p in waiting if p[1] < first]
        waiting = [p for p in waiting if p[1] >= first]
