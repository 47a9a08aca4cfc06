"""The invariants of the ledger, checked on any run directory without SGLang.

Each check is a function of a `Run` that returns the first violation in words, or None. What a check covered is
counted, because a check of nothing proves nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sglang_probe.run import schema
from sglang_probe.run import tokens as positions
from sglang_probe.run.hook_points import EMBED
from sglang_probe.run.run import Run
from sglang_probe.verify import segment
from sglang_probe.verify.check import Check
from sglang_probe.verify.phases import phases_fit
from sglang_probe.verify.selected import held_as_selected
from sglang_probe.verify.telemetry import telemetry_holds

if TYPE_CHECKING:
    import torch


def verify(run: Run, *, embedding: torch.Tensor | None = None) -> list[Check]:
    """Check every invariant; `embedding` as in `sglang_probe.verify.ownership.rows_match_tokens`."""
    from sglang_probe.verify.ownership import rows_match_tokens

    intact = files_intact(run)
    if not intact.holds:
        return [intact]  # what else could be read is not what was recorded
    checks: list[Callable[[Run], Check]] = [
        spans_tile,
        phases_fit,
        reuse_reconciles,
        forwards_add_up,
        origins_hold,
        rebinds_hold,
        rows_owned_once,
    ]
    if "evict" in run.requests(interrupted=True) and run.requests(interrupted=True)["evict"].notna().any():
        checks.append(kept_sets_stay_private)
    results = [intact, *(check(run) for check in checks)]
    if run.manifest.get("telemetry"):
        results.insert(-1, telemetry_holds(run))
    # Content is asked only of rows that have one owner, and of a run that has any.
    if results[-1].holds and results[-1].covered:
        if run.selected.partial:
            results.append(held_as_selected(run))
        if EMBED in run.hook_points and results[-1].holds:
            results.append(rows_match_tokens(run, embedding=embedding))
    return results


def files_intact(run: Run) -> Check:
    """Every file of every part is present with its recorded hash."""
    name, claim = "files", "every file has the SHA-256 that was recorded when it was written"
    files = [(f, digest) for part in run.parts() for f, digest in part.files.items()]
    for f, digest in files:
        path = run.path / f
        if not path.exists():
            return Check(name, claim, len(files), "files", f"{f} is missing")
        with open(path, "rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                return Check(name, claim, len(files), "files", f"{f} was changed after it was written")
    return Check(name, claim, len(files), "files")


def spans_tile(run: Run) -> Check:
    """Spans of each request's last attempt tile its positions, without gap or overlap."""
    name = "tiling"
    claim = "spans tile [0, prompt + output - 1); the last sampled token has no KV unless a discarded step computed it"
    spans = run.last_attempt().sort_values(["rid", "start"], kind="stable")
    previous_end = spans.groupby("rid")["end"].shift()
    previous_end = previous_end.fillna(segment.first_positions(run, spans)).astype(int)
    wrong = spans[spans["start"] != previous_end]
    requests = run.requests(interrupted=True)
    unit, covered = "requests", len(requests)
    ended = run.engine_requests()["rid"]
    if ended.duplicated().any():
        return Check(name, claim, covered, unit, f"{ended[ended.duplicated()].iloc[0]} ended more than once")
    if len(wrong):
        r = wrong.iloc[0]
        kind = "gap" if r["start"] > previous_end[wrong.index[0]] else "overlap"
        return Check(
            name,
            claim,
            covered,
            unit,
            f"{kind} in {r['rid']} at position {min(r['start'], previous_end[wrong.index[0]])}",
        )
    ends = spans.groupby("rid")["end"].max()
    overshoot = spans[spans["phase"] == schema.OVERSHOOT].groupby("rid").size()
    recomputed = spans[spans["phase"] == schema.RECOMPUTE].groupby("rid")["end"].max()
    for r in requests.itertuples():
        if r.finish_reason in segment.OPEN_ENDED:
            continue
        expected = r.prompt_len + max(r.output_len - 1, 0) + int(overshoot.get(r.rid, 0))
        # An attempt after a retraction prefills the last sampled token too. Dropped before it sampled the next one,
        # that token has a KV entry.
        expected += r.finish_reason == "abort" and int(recomputed.get(r.rid, 0)) == r.prompt_len + r.output_len
        if int(ends.get(r.rid, 0)) != expected:
            return Check(
                name, claim, covered, unit, f"{r.rid}: spans end at {int(ends.get(r.rid, 0))}, expected {expected}"
            )
    missing = int(run.manifest["requests_expected"]) - requests["index"].nunique()
    notes = [f"{missing} requests of the workload were never served" if missing else None, segment.note(run)]
    return Check(name, claim, covered, unit, note="; ".join(n for n in notes if n) or None)


def reuse_reconciles(run: Run) -> Check:
    """Per request, reused positions of the first attempt equal SGLang's `cached_tokens`, which counts only those."""
    name, claim = "reuse", "reused positions per request equal SGLang's own cached_tokens"
    spans = run.spans()
    reused = spans[(spans["status"] == schema.REUSED) & (spans["attempt"] == 0)]
    per_request = (reused["end"] - reused["start"]).groupby(reused["rid"]).sum()
    requests = run.engine_requests()
    elsewhere = requests["rid"].isin(segment.not_wholly_here(run))
    requests = requests[~elsewhere]
    ours = requests["rid"].map(per_request).fillna(0).astype(int)
    wrong = requests[ours != requests["cached_tokens"]]
    disagreements = run.manifest.get("cached_tokens_disagreements") or []
    retracted = int((requests["retractions"] > 0).sum())
    note = f"{retracted} requests were retracted; SGLang counts their first attempt only" if retracted else None
    if elsewhere.any():
        note = f"{note}; " if note else ""
        note += f"not asked of {int(elsewhere.sum())} requests that began in another segment or were dropped in part"
    violation = None
    if len(wrong):
        r = wrong.iloc[0]
        violation = f"{r['rid']}: {int(ours[wrong.index[0]])} reused in the ledger, {r['cached_tokens']} by SGLang"
    elif disagreements:
        violation = f"{disagreements[0]}: the API's cached_tokens differs from the scheduler's"
    return Check(name, claim, len(requests), "requests", violation, note)


def forwards_add_up(run: Run) -> Check:
    """The computed spans of each forward pass sum to the KV slots that SGLang allocated for it."""
    name, claim = "forwards", "computed spans of a forward pass sum to the KV slots that SGLang allocated for it"
    forwards, spans = run.forwards(), run.spans()
    for rank, mine in forwards.groupby("dp_rank"):
        first = int(mine["forward_id"].min())
        last = int(mine["forward_id"].max())
        ours = spans[spans["dp_rank"] == rank]
        unknown = _outside(ours, first, last)
        if len(unknown):
            s = unknown.iloc[0]
            violation = f"{s['rid']} positions {s['start']} to {s['end']}: forward {s['forward_id']} is not in the run"
            return Check(name, claim, len(forwards), "forwards", violation)
        counted = computed_per_forward(ours, first, last - first + 1)
        expected = mine["slots"].to_numpy() - mine["unaccounted"].fillna(0).to_numpy(np.int64)
        found = counted[mine["forward_id"].to_numpy() - first]
        if (bad := np.nonzero(found != expected)[0]).size:
            f = mine.iloc[bad[0]]
            violation = (
                f"forward {f['forward_id']}: spans hold {found[bad[0]]} tokens, SGLang allocated {expected[bad[0]]}"
            )
            return Check(name, claim, len(forwards), "forwards", violation)
    lost = int(forwards["unaccounted"].fillna(0).sum())
    note = f"{lost} positions belong to requests that could not be accounted for" if lost else None
    return Check(name, claim, len(forwards), "forwards", None, note)


def _outside(spans: pd.DataFrame, first: int, last: int) -> pd.DataFrame:
    """Computed spans that name a forward pass before `first` or after `last`."""
    spans = spans[spans["status"] == schema.COMPUTED]
    steps = np.where(spans["phase"].isin(schema.STEP_PHASES), spans["end"] - spans["start"] - 1, 0)
    return spans[(spans["forward_id"] < first) | (spans["forward_id"] + steps > last)]


def computed_per_forward(spans: pd.DataFrame, first: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Computed tokens of forwards `first .. first + count`, `[count]`. Step spans spread over consecutive forwards."""
    computed = spans[spans["status"] == schema.COMPUTED]
    length = (computed["end"] - computed["start"]).to_numpy()
    forward = computed["forward_id"].to_numpy() - first
    steps = computed["phase"].isin(schema.STEP_PHASES).to_numpy()
    total = np.bincount(forward[~steps], weights=length[~steps], minlength=count).astype(np.int64)
    edges = np.zeros(count + 1, dtype=np.int64)
    np.add.at(edges, forward[steps], 1)
    np.add.at(edges, forward[steps] + length[steps], -1)
    return np.asarray(total[:count] + np.cumsum(edges)[:count])


def origins_hold(run: Run) -> Check:
    """Every reused span's origin is a computed span with the same tokens over the same prefix."""
    name = "lineage"
    claim = "the origin of every reused position computed it, at the same position after the same tokens"
    spans = run.spans()
    reused = spans[spans["status"] == schema.REUSED]
    known = reused[reused["origin_rid"].notna()]
    before = int((reused["end"] - reused["start"]).sum() - (known["end"] - known["start"]).sum())
    note = f"{before} reused positions were computed before the recording" if before else None
    covered = int((known["end"] - known["start"]).sum())
    tokens = positions.expand(known)
    note = "; ".join(n for n in (note, segment.other_weights(run, known)) if n) or None
    at = positions.find_computed(
        spans, tokens["origin_rid"], tokens["origin_attempt"].to_numpy(np.int64), tokens["position"].to_numpy()
    )
    unseen = (at < 0) & segment.computed_elsewhere(run, tokens)
    if unseen.any():
        note = f"{note}; " if note else ""
        note += f"{int(unseen.sum())} reused positions were computed in another segment, or their origin was dropped"
        covered -= int(unseen.sum())
    lost = (at < 0) & ~unseen
    if lost.any():
        bad = tokens.iloc[int(np.argmax(lost))]
        violation = f"{bad['rid']} position {bad['position']}: {bad['origin_rid']} never computed it"
        return Check(name, claim, covered, "positions", violation, note)
    ids = {r.rid: _all_ids(r) for r in run.requests(interrupted=True).itertuples()}
    for s in known.itertuples():
        mine, theirs = ids.get(s.rid), ids.get(s.origin_rid)
        if mine is None or theirs is None:
            continue  # not a request of the workload, or interrupted: its output is unknown
        common = min(s.end, len(mine), len(theirs))
        if not np.array_equal(mine[:common], theirs[:common]):
            violation = f"{s.rid} positions {s.start} to {s.end}: the tokens of origin {s.origin_rid} differ"
            return Check(name, claim, covered, "positions", violation, note)
    if len(known) and all(x is None for x in ids.values()):
        note = f"{note}; " if note else ""
        note += "token ids were not recorded, so that the tokens could not be compared"
    return Check(name, claim, covered, "positions", None, note)


def rebinds_hold(run: Run) -> Check:
    """A request is rebound only where it has an entry, to one that another request computed for the same tokens."""
    name = "rebinds"
    claim = "a rebound position was computed by both requests, after the same tokens, before it was rebound"
    rebinds = run.rebinds()
    known = rebinds[rebinds["origin_rid"].notna()]
    covered = int((known["end"] - known["start"]).sum())
    nowhere = {"status": schema.REUSED, "phase": None, "row_start": -1, "row_step": 0}
    tokens = positions.expand(known.assign(forward_id=known["at_forward"], **nowhere))
    spans = run.spans()
    steps = np.isin(spans["phase"].to_numpy(object), schema.STEP_PHASES)
    for who, rid, attempt in (("it", "rid", "attempt"), ("its origin", "origin_rid", "origin_attempt")):
        position = tokens["position"].to_numpy()
        at = positions.find_computed(spans, tokens[rid], tokens[attempt].to_numpy(np.int64), position)
        asked = tokens.assign(origin_rid=tokens[rid], origin_attempt=tokens[attempt])
        elsewhere = segment.computed_elsewhere(run, asked)
        if who == "it":  # what was matched at admission may be rebound as well
            elsewhere = elsewhere | _reused(spans, tokens)
        span = spans.iloc[np.maximum(at, 0)]
        forward = span["forward_id"].to_numpy() + steps[np.maximum(at, 0)] * (position - span["start"].to_numpy())
        bad = np.where(at < 0, ~elsewhere, forward >= tokens["forward_id"].to_numpy())
        if bad.any():
            b = tokens.iloc[int(np.argmax(bad))]
            violation = (
                f"{b['rid']} position {b['position']}, rebound at forward {b['forward_id']}: {who} had not computed it"
            )
            return Check(name, claim, covered, "positions", violation)
    ids = {r.rid: _all_ids(r) for r in run.requests(interrupted=True).itertuples()}
    for s in known.itertuples():
        mine, theirs = ids.get(s.rid), ids.get(s.origin_rid)
        if mine is not None and theirs is not None:
            common = min(s.end, len(mine), len(theirs))
            if not np.array_equal(mine[:common], theirs[:common]):
                violation = f"{s.rid} positions {s.start} to {s.end}: the tokens of {s.origin_rid} differ"
                return Check(name, claim, covered, "positions", violation)
    return Check(name, claim, covered, "positions")


def _reused(spans: pd.DataFrame, tokens: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which of these positions their request reused in this attempt."""
    reused = positions.expand(spans[spans["status"] == schema.REUSED])
    keys = ["rid", "attempt", "position"]
    held = pd.MultiIndex.from_frame(reused[keys])
    return np.asarray(pd.MultiIndex.from_frame(tokens[keys]).isin(held))


def _all_ids(request: Any) -> np.ndarray[Any, Any] | None:
    if request.prompt_ids is None:  # a live recording without any
        return None
    output = [] if request.output_ids is None else request.output_ids
    return np.concatenate([request.prompt_ids, output]).astype(np.int64)


def kept_sets_stay_private(run: Run) -> Check:
    """Entries that were computed from a compressed cache are no other request's, nor are a full one's theirs."""
    name, claim = "kept sets", "no entry passes between a request with a kept set and others past its cache"
    requests = run.requests(interrupted=True)
    evicted = requests[requests["evict"].notna()].set_index("rid")["cache_len"]
    spans, rebinds = run.spans(), run.rebinds()
    shared = pd.concat([spans[spans["status"] == schema.REUSED], rebinds])
    violation = None
    taken = shared[shared["origin_rid"].isin(evicted.index) & (shared["origin_rid"] != shared["rid"])]
    cache_end = evicted.astype(float).reindex(shared["rid"]).fillna(np.inf).to_numpy()
    beyond = shared[shared["end"].to_numpy() > cache_end]
    if len(taken):
        r = taken.iloc[0]
        violation = f"{r['rid']} uses entries of {r['origin_rid']}, which has a kept set"
    elif len(beyond):
        r = beyond.iloc[0]
        violation = f"{r['rid']} uses entries of {r['origin_rid']} up to {r['end']}, past its cache"
    return Check(name, claim, len(evicted), "requests", violation)


def rows_owned_once(run: Run) -> Check:
    """Every captured row belongs to exactly one computed position. Numbers of rows that were not selected count too."""
    name, claim = "row ownership", "every captured row belongs to exactly one computed position"
    spans = run.spans()
    with_rows = spans[spans["row_start"] >= 0]
    total = run.row_count()
    if with_rows.empty:
        violation = f"{total} rows were captured and no span has any" if total else None
        return Check(name, claim, total, "rows", violation)
    claimed = positions.expand(with_rows)["row"].to_numpy()
    captured = np.concatenate([np.arange(p.rows_end - p.rows, p.rows_end) for p in run.parts()])
    owners = np.bincount(np.searchsorted(captured, claimed), minlength=total + 1)
    unknown = claimed[~np.isin(claimed, captured)]
    violation = None
    if len(unknown):
        violation = f"a span claims row {unknown[0]}, which does not exist; {total} do"
    elif (bad := np.nonzero(owners[:total] != 1)[0]).size:
        violation = f"row {captured[bad[0]]} has {owners[bad[0]]} owners"
    return Check(name, claim, total, "rows", violation)
