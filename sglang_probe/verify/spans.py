"""Spans of each request: they tile its positions, attempt by attempt, and its prefill chunks follow each other."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.verify import segment
from sglang_probe.verify.check import Check
from sglang_probe.verify.frames import is_step, joined_at_marks, last_forward


def spans_tile(run: Run) -> Check:
    """Spans of each request's last attempt tile its positions, without gap or overlap."""
    name = "tiling"
    claim = "spans tile [0, prompt + output - 1); the last sampled token has no KV unless a discarded step computed it"
    spans = run.last_attempt().sort_values(["rid", "start"], kind="stable")
    requests = run.requests(interrupted=True)
    unit, covered = "requests", len(requests)
    ended = run.engine_requests()["rid"]
    if ended.duplicated().any():
        return Check(name, claim, covered, unit, f"{ended[ended.duplicated()].iloc[0]} ended more than once")
    if violation := _broken(run, spans):
        return Check(name, claim, covered, unit, violation)
    ends = spans.groupby("rid")["end"].max()
    overshoot = spans[spans["phase"] == schema.OVERSHOOT].groupby("rid").size()
    recomputed = spans[spans["phase"] == schema.RECOMPUTE].groupby("rid")["end"].max()
    closed = requests[~requests["finish_reason"].isin(segment.OPEN_ENDED)]
    rid = closed["rid"]
    expected = closed["prompt_len"].to_numpy(float) + np.maximum(closed["output_len"].to_numpy() - 1, 0)
    expected = expected + rid.map(overshoot).fillna(0).to_numpy()
    # An attempt after a retraction prefills the last sampled token too, if there is one. Dropped before it sampled the
    # next one, that token has a KV entry.
    whole = rid.map(recomputed).fillna(0).to_numpy() == (closed["prompt_len"] + closed["output_len"]).to_numpy(float)
    sampled = (closed["output_len"] > 0).to_numpy()
    expected = expected + ((closed["finish_reason"] == "abort").to_numpy() & whole & sampled)
    found = rid.map(ends).fillna(0).to_numpy()
    if (found != expected).any():
        i = int(np.argmax(found != expected))
        violation = f"{rid.iloc[i]}: spans end at {int(found[i])}, expected {expected[i]:.0f}"
        return Check(name, claim, covered, unit, violation)
    missing = int(run.manifest["requests_expected"]) - requests["index"].nunique()
    notes = [f"{missing} requests of the workload were never served" if missing > 0 else None, segment.note(run)]
    return Check(name, claim, covered, unit, note="; ".join(n for n in notes if n) or None)


def _broken(run: Run, spans: pd.DataFrame) -> str | None:
    """The first gap or overlap of spans, sorted by request, attempt and start."""
    previous_end = spans.groupby(["rid", "attempt"])["end"].shift()
    previous_end = previous_end.fillna(segment.first_positions(run, spans)).astype(int)
    wrong = spans[spans["start"] != previous_end]
    if wrong.empty:
        return None
    r, before = wrong.iloc[0], previous_end[wrong.index[0]]
    return f"{'gap' if r['start'] > before else 'overlap'} in {r['rid']} at position {min(r['start'], before)}"


def attempts_follow(run: Run) -> Check:
    """Attempts count retractions; each tiles from its first position, in order of time and of its prefill's chunks."""
    name = "attempts"
    claim = "attempts count retractions, and the spans of each follow each other in position, time and prefill chunk"
    spans = run.spans()
    spans = spans.sort_values(["rid", "attempt", "start"], kind="stable", ignore_index=True)
    chunks = joined_at_marks(spans)
    violation = _broken(run, spans) or _attempts(run, spans) or _order(chunks) or _chunks(run, chunks)
    return Check(name, claim, len(spans), "spans", violation)


def _attempts(run: Run, spans: pd.DataFrame) -> str | None:
    there = spans[["rid", "attempt"]].drop_duplicates()
    carried = {rid: attempt for rid, (attempt, _) in segment.carried_in(run).items()}
    first = there["rid"].map(carried).fillna(0).astype(int)
    # Retracted in the segment before, or before anything more of that attempt was computed: it goes on with the next.
    began = there.groupby("rid")["attempt"].transform("min")
    first += there["rid"].isin(carried) & (began == first + 1)
    expected = there.groupby("rid").cumcount() + first
    wrong = there[there["attempt"] != expected]
    if len(wrong):
        r = wrong.iloc[0]
        return f"{r['rid']}: attempt {r['attempt']} is there without the one before it"
    ended = run.engine_requests()
    last = ended["rid"].map(there.groupby("rid")["attempt"].max()).fillna(0).to_numpy(int)
    # One that was dropped while it waited to be served again has no spans of its last attempt.
    waits = ((ended["finish_reason"] == "abort") | ended["rid"].isin(segment.not_wholly_here(run))).to_numpy()
    retractions = ended["retractions"].to_numpy(int)
    wrong_count = np.where(waits, last > retractions, last != retractions)
    if wrong_count.any():
        i = int(np.argmax(wrong_count))
        return (
            f"{ended['rid'].iloc[i]}: spans of {last[i] + 1} attempts, and SGLang retracted it {retractions[i]} times"
        )
    return None


def _order(spans: pd.DataFrame) -> str | None:
    """Within an attempt a later position is computed by a later forward, or by the same one."""
    timed = spans[spans["status"].isin((schema.COMPUTED, schema.REUSED))]
    ends = np.where(timed["status"] == schema.COMPUTED, last_forward(timed), timed["forward_id"].to_numpy(np.int64))
    same = (timed["rid"].to_numpy()[1:] == timed["rid"].to_numpy()[:-1]) & (
        timed["attempt"].to_numpy()[1:] == timed["attempt"].to_numpy()[:-1]
    )
    computed = (timed["status"] == schema.COMPUTED).to_numpy()
    # Two computed spans are of two forwards; what is reused before a computed one is of its forward.
    least = ends[:-1] + (computed[1:] & computed[:-1])
    bad = same & (timed["forward_id"].to_numpy(np.int64)[1:] < least)
    if bad.any():
        s = timed.iloc[int(np.argmax(bad)) + 1]
        return f"{s['rid']} positions {s['start']} to {s['end']}: forward {s['forward_id']} is not after those before"
    return None


def _chunks(run: Run, spans: pd.DataFrame) -> str | None:
    """Chunks of a prefill are numbered from 0; what is reused has chunk and forward of the part that follows it."""
    parts = spans[(spans["status"] == schema.COMPUTED) & ~is_step(spans)]
    parts = parts[~parts["rid"].isin(segment.not_wholly_here(run))]
    number = parts.groupby(["rid", "attempt"]).cumcount()
    wrong = parts[parts["chunk"] != number]
    if len(wrong):
        s = wrong.iloc[0]
        return (
            f"{s['rid']} positions {s['start']} to {s['end']} of attempt {s['attempt']}: chunk {s['chunk']} is not next"
        )
    attempt = spans["rid"].astype(str) + "\0" + spans["attempt"].astype(str)
    follows = spans[["forward_id", "chunk", "status"]].where(spans["status"] != schema.REUSED)
    follows = follows.groupby(attempt.to_numpy()).bfill()
    reused = (spans["status"] == schema.REUSED).to_numpy()
    lonely = (
        reused & (follows["status"] != schema.COMPUTED).to_numpy() & (follows["status"] != schema.DROPPED).to_numpy()
    )
    here = (follows["status"] == schema.COMPUTED).to_numpy()
    other = reused & here & (follows[["forward_id", "chunk"]] != spans[["forward_id", "chunk"]]).any(axis=1).to_numpy()
    for bad, what in ((lonely, "was reused, and nothing was computed after it"), (other, None)):
        if bad.any():
            i = int(np.argmax(bad))
            s, f = spans.iloc[i], follows.iloc[i]
            what = what or (
                f"reused by forward {s['forward_id']} in chunk {s['chunk']}, and the part that follows is of forward "
                f"{f['forward_id']:.0f} in chunk {f['chunk']:.0f}"
            )
            return f"{s['rid']} positions {s['start']} to {s['end']}: {what}"
    return None
