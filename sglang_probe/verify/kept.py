"""Kept sets: they are those that requests name, and nobody shares entries of a compressed cache."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sglang_probe.kept_set import KeptFile
from sglang_probe.run import schema
from sglang_probe.run.damage import reading
from sglang_probe.run.run import Run
from sglang_probe.verify.check import Check


def has_kept_sets(run: Run) -> bool:
    """Whether anything in the run says that requests attended to kept sets."""
    requests = run.requests(interrupted=True)
    return bool(run.manifest.get("kept")) or ("evict" in requests and bool(requests["evict"].notna().any()))


def kept_sets_stay_private(run: Run) -> Check:
    """Entries that were computed from a compressed cache are no other request's, nor are a full one's theirs."""
    name, claim = "kept sets", "no entry passes between a request with a kept set and others past its cache"
    requests = run.requests(interrupted=True)
    evicted = requests[requests["evict"].notna()].set_index("rid")["cache_len"]
    spans, rebinds = run.spans(), run.rebinds()
    shared = pd.concat([spans[spans["status"] == schema.REUSED], rebinds])
    taken = shared[shared["origin_rid"].isin(evicted.index) & (shared["origin_rid"] != shared["rid"])]
    cache_end = evicted.astype(float).reindex(shared["rid"]).fillna(np.inf).to_numpy()
    beyond = shared[shared["end"].to_numpy() > cache_end]
    if len(taken):
        r = taken.iloc[0]
        violation: str | None = f"{r['rid']} uses entries of {r['origin_rid']}, which has a kept set"
    elif len(beyond):
        r = beyond.iloc[0]
        violation = f"{r['rid']} uses entries of {r['origin_rid']} up to {r['end']}, past its cache"
    else:
        violation = _as_in_the_file(run, requests)
    return Check(name, claim, len(evicted), "requests", violation)


def _as_in_the_file(run: Run, requests: pd.DataFrame) -> str | None:
    """Requests name sets of the file, with its lengths and counts."""
    told = run.manifest.get("kept")
    named = requests[requests["evict"].notna()]
    if not told:
        return f"{named['rid'].iloc[0]} has a kept set, and the manifest names no file of them" if len(named) else None
    path = run.path / str(told.get("file"))
    with reading(path):
        kept = KeptFile(path)
    if told.get("sets") != len(kept):
        return f"the manifest counts {told.get('sets')} kept sets, and {path.name} has {len(kept)}"
    if (digest := run.manifest.get("kept_digest")) is not None and digest != kept.digest(kept):
        return f"the sets of {path.name} are not those that the manifest has the digest of (kept_digest)"
    for rid, key, length, counts in zip(named["rid"], named["evict"], named["cache_len"], named["kept"], strict=True):
        if key not in kept:
            return f"{rid} names the kept set `{key}`, which {path.name} does not have"
        if kept.shapes[key][-1] != length:
            return f"{rid}: its kept set is of {kept.shapes[key][-1]} positions, and cache_len is {length}"
        if counts is None or not np.array_equal(counts, kept.counts[key][0].reshape(-1)):
            return f"{rid}: `kept` is not what its kept set keeps"
    if run.complete and (unused := set(kept) - set(named["evict"])):
        return f"{path.name} has the set `{min(unused)}`, and no request of the complete run names it"
    return None
