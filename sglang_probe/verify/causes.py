"""Why each token was computed: `sglang_probe.run.causes`, asked against what the engine counted."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sglang_probe.run import schema
from sglang_probe.run.causes import Cause, autopsy, causes_known
from sglang_probe.run.run import Run
from sglang_probe.verify.check import Check

MOST = 30_000_000
"""Tokens of a run that are compared with each other: about 4 GB."""


def has_causes(run: Run) -> bool:
    """Whether the run says why tokens were computed."""
    return causes_known(run)


def causes_add_up(run: Run) -> Check:
    """Every position that a prefill computed has one cause, and what is said to be lost was lost.

    By forward, the causes sum to SGLang's prefill tokens. What the tree gave is what the spans reuse, and no more than
    it could give. Between the last moment at which the tree had an evicted position and the request's match there is
    an eviction, or a flush: what was there and was not given without either would be a fault of the ledger.
    """
    name, claim = (
        "causes",
        "every position that a prefill computed has one cause, and they sum to the engine's own count",
    )
    ended = run.engine_requests()
    tokens = int(ended["prompt_len"].sum() + ended["output_len"].sum())
    if tokens > MOST:
        note = (
            f"not asked: the run has {tokens:,} tokens, and {MOST:,} are compared here; `sglang-probe why` has no limit"
        )
        return Check(name, claim, 0, "positions", None, note)
    found = autopsy(run).pieces
    tree = run.tree()
    positions = int((found["end"] - found["start"]).sum())
    violation = _sums(run, found) or _given(run, tree) or _lost(found, tree)
    return Check(name, claim, positions, "positions", violation)


def _sums(run: Run, found: pd.DataFrame) -> str | None:
    forwards = run.forwards()
    forwards = forwards[forwards["unaccounted"].fillna(0) == 0].set_index("forward_id")["prefill_tokens"]
    said = (found["end"] - found["start"]).groupby(found["forward_id"]).sum()
    said = said.reindex(forwards.index).fillna(0).astype(np.int64)
    wrong = forwards.index[forwards.to_numpy(np.int64) != said.to_numpy()]
    # A forward whose facts were dropped, because the disk was slower than the server, has no spans at all.
    if not len(wrong):
        return None
    f = wrong[0]
    return f"forward {f} computed {forwards[f]} prompt tokens, and the causes sum to {said[f]}"


def _given(run: Run, tree: pd.DataFrame) -> str | None:
    matched = tree[tree["event"] == schema.MATCHED]
    over = matched[matched["limit"].notna() & (matched["end"] > matched["limit"])]
    if len(over):
        r = over.iloc[0]
        return f"the tree gave {r['rid']} {r['end']} positions, and could give {r['limit']:.0f}"
    spans = run.spans()
    reused = spans[spans["status"] == schema.REUSED].groupby(["rid", "attempt"])["end"].max()
    given = matched.set_index(["rid", "attempt"])["end"]
    both = given.to_frame("given").join(reused.rename("reused"), how="left").fillna(0)
    wrong = both[(both["given"] != both["reused"]) & both.index.isin(_computing(spans))]
    if wrong.empty:
        return None
    (rid, attempt), r = wrong.index[0], wrong.iloc[0]
    return f"the tree gave {rid} (attempt {attempt}) {r['given']:.0f} positions, and it reused {r['reused']:.0f}"


def _computing(spans: pd.DataFrame) -> pd.MultiIndex:
    """Attempts that a prefill computed something of."""
    done = spans[(spans["status"] == schema.COMPUTED) & (spans["chunk"] == 0)]
    return pd.MultiIndex.from_frame(done[["rid", "attempt"]])


def _lost(found: pd.DataFrame, tree: pd.DataFrame) -> str | None:
    for rank, of_rank in found.groupby("dp_rank"):
        events = tree[tree["dp_rank"] == rank]
        epoch = (events["event"] == schema.OPENED).cumsum().to_numpy(np.int64)
        order = events["order"].to_numpy(np.int64) + (epoch << 40)
        for cause, kinds in (
            (Cause.EVICTED, [schema.EVICTED]),
            (Cause.FLUSHED, [schema.FLUSHED, schema.OPENED]),
        ):
            lost = of_rank[of_rank["cause"] == cause]
            at = np.sort(order[events["event"].isin(kinds).to_numpy()])
            between = np.searchsorted(at, lost["until"]) - np.searchsorted(at, lost["since"], side="right")
            if (between == 0).any():
                r = lost.iloc[int(np.argmin(between))]
                return (
                    f"positions {r['start']} to {r['end']} of {r['rid']} were in the tree and were not given, and "
                    "nothing was evicted meanwhile"
                )
    return None
