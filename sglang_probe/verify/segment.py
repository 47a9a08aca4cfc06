"""What a segment of a live recording leaves to its neighbours, so that the checks can say so instead of guessing.

A request that is in flight when a segment is closed has spans in two segments. The manifest of the later one names it
with the position at which it goes on (`segment.carried_in`), and its row in the earlier one has the finish reason
`continues`. For a run that is no segment, everything here is empty.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.run import schema
from sglang_probe.run.run import Run

WITHOUT_END = (schema.INTERRUPTED, schema.CONTINUES, schema.ENDED_EARLIER)
"""Finish reasons of requests whose end is not in this run."""

OPEN_ENDED = (*WITHOUT_END, schema.UNACCOUNTED)
"""Finish reasons of requests whose end is not in this run, or not known."""


def of(run: Run) -> dict[str, Any] | None:
    """What the manifest says of the segment; None for a run that is none."""
    found: dict[str, Any] | None = run.manifest.get("segment")
    return found


def carried_in(run: Run) -> dict[str, tuple[int, int]]:
    """`rid: (attempt, position)` of requests that the segment before began."""
    carried = (run.manifest.get("segment") or {}).get("carried_in", {})
    return {rid: (int(attempt), int(position)) for rid, (attempt, position) in carried.items()}


def first_positions(run: Run, spans: pd.DataFrame) -> pd.Series:
    """For each span the position at which its request and attempt begin in this run: 0, or where it was carried in."""
    carried = carried_in(run)
    if not carried:
        return pd.Series(0, index=spans.index)
    begins = [
        carried[rid][1] if rid in carried and carried[rid][0] == attempt else 0
        for rid, attempt in zip(spans["rid"], spans["attempt"], strict=True)
    ]
    return pd.Series(begins, index=spans.index)


def not_wholly_here(run: Run) -> set[str]:
    """Requests whose reuse cannot be counted in this run: begun in another segment, or dropped in part."""
    return set(carried_in(run)) | dropped(run)


def dropped(run: Run) -> set[str]:
    """Requests of which facts were dropped, or that could not be accounted for."""
    spans, ended = run.spans(), run.engine_requests()
    return set(spans.loc[spans["status"] == schema.DROPPED, "rid"]) | set(
        ended.loc[ended["finish_reason"] == schema.UNACCOUNTED, "rid"]
    )


def known_weights(run: Run) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Forward passes that ran with the weights that the engine was started with, ascending; None: all of them.

    What was loaded into a running engine later is not at the model's path, so that rows of it can be compared with
    nothing.
    """
    forwards = run.forwards()
    later = forwards["weights"].fillna(0) > 0
    if not later.any():
        return None
    return np.sort(forwards.loc[~later, "forward_id"].to_numpy(np.int64))


def other_weights(run: Run, reused: pd.DataFrame) -> str | None:
    """How much of these reused spans was computed with other weights than those of the forward that reused it."""
    forwards = run.forwards()
    if forwards["weights"].fillna(0).nunique() < 2:
        return None
    weights = forwards.set_index("forward_id")["weights"].fillna(0)
    spans = run.spans()
    computed = spans[spans["status"] == schema.COMPUTED]
    first = computed.groupby("rid")["forward_id"].agg(["min", "max"])
    newest = weights.reindex(first["max"]).set_axis(first.index)
    origin = reused["origin_rid"].map(newest)
    older = origin.to_numpy(float) < weights.reindex(reused["forward_id"]).to_numpy(float)
    lengths = (reused["end"] - reused["start"])[older]
    return f"{int(lengths.sum())} reused positions were computed with earlier weights" if len(lengths) else None


def computed_elsewhere(run: Run, tokens: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which reused positions may have their origin outside this run: in an earlier segment, or among dropped facts.

    An origin that this run knows from its first position on must be here, and so must every origin in the first segment
    of a server process.
    """
    spans = run.spans()
    lost = tokens["origin_rid"].isin(dropped(run)).to_numpy()
    here_alone = of(run)
    if here_alone is None or here_alone.get("first_of_process"):
        return np.asarray(lost)
    carried = carried_in(run)
    here = set(spans["rid"]) - set(carried)
    begins = tokens["origin_rid"].map({rid: position for rid, (_, position) in carried.items()}).fillna(0)
    attempts = tokens["origin_rid"].map({rid: attempt for rid, (attempt, _) in carried.items()}).fillna(0)
    before = (tokens["position"] < begins) | (tokens["origin_attempt"] < attempts)
    unknown = ~tokens["origin_rid"].isin(here | set(carried))
    return np.asarray(lost | unknown.to_numpy() | before.to_numpy())


def note(run: Run) -> str | None:
    """What of this segment is in its neighbours, in words."""
    carried, finish = carried_in(run), run.requests()["finish_reason"]
    continues = int((finish == schema.CONTINUES).sum())
    said = []
    if carried:
        said.append(f"{len(carried)} requests began in the segment before")
    if continues:
        said.append(f"{continues} requests continue in another segment")
    spans = run.spans()
    given_up = set(run.requests().loc[finish == schema.UNACCOUNTED, "rid"])
    slow = (spans["status"] == schema.DROPPED) & ~spans["rid"].isin(given_up)
    if slow.any():
        positions = int((spans["end"] - spans["start"])[slow].sum())
        said.append(f"{positions} positions were dropped because the disk was too slow")
    if given_up:
        said.append(f"{len(given_up)} requests could not be accounted for; the manifest says why (`unaccounted`)")
    return "; ".join(said) or None
