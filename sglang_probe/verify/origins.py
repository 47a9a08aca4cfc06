"""Who computed what was reused: origins of reused spans, and rebinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.run import schema
from sglang_probe.run import tokens as positions
from sglang_probe.run.run import Run
from sglang_probe.verify import segment
from sglang_probe.verify.check import Check
from sglang_probe.verify.frames import Pieces, Prefixes, computed_pieces

Array = np.ndarray[Any, Any]


def origins_hold(run: Run) -> Check:
    """Every reused span's origin computed it before, after the same tokens, and still owned the entry."""
    name = "lineage"
    claim = "the origin of every reused position computed it before, at the same position after the same tokens"
    spans = run.spans()
    reused = spans[spans["status"] == schema.REUSED]
    known = reused[reused["origin_rid"].notna()]
    covered = int((known["end"] - known["start"]).sum())
    note, violation = _before_the_recording(run, reused, "reused")
    note = "; ".join(n for n in (note, segment.other_weights(run, known)) if n) or None
    if violation is None:
        violation, unseen = _computed_before(run, known, known["forward_id"].to_numpy(np.int64), "reused", "origin")
        covered -= unseen
        if unseen:
            note = f"{note}; " if note else ""
            note += f"{unseen} reused positions were computed in another segment, or their origin was dropped"
    violation = violation or _replaced(run, known, known["forward_id"].to_numpy(np.int64))
    if violation is None and len(known):
        prefixes = Prefixes(run)
        violation = _same_tokens(prefixes, known)
        if not prefixes.known:
            note = f"{note}; " if note else ""
            note += "token ids were not recorded, so that the tokens could not be compared"
    return Check(name, claim, covered, "positions", violation, note)


def _before_the_recording(run: Run, spans: pd.DataFrame, what: str) -> tuple[str | None, str | None]:
    """Note and violation of entries of unknown origin.

    A recording begins with an empty cache: a harvest flushes it, a server's starts before it serves. So an unknown
    origin was forgotten, which takes more positions than a recorder remembers, or lies in a segment before.
    """
    nameless = spans[spans["origin_rid"].isna()]
    if nameless.empty:
        return None, None
    count = int((nameless["end"] - nameless["start"]).sum())
    here = segment.of(run)
    every = run.spans()
    positions_here = int((every["end"] - every["start"]).sum())
    # A live recording that begins again after a stop finds the cache as it is.
    forgotten = here is not None and not (here.get("first_of_process") and here.get("number") == 0)
    if forgotten or positions_here > schema.REMEMBERED_PAGES:
        return f"{count} {what} positions are of an origin that the recording had forgotten", None
    s = nameless.iloc[0]
    return None, (
        f"{s['rid']} positions {s['start']} to {s['end']}: {what}, and of no origin; the recording began with an empty "
        "cache and was too short to forget one"
    )


def _computed_before(run: Run, asked: pd.DataFrame, forward: Array, what: str, who: str) -> tuple[str | None, int]:
    """Whether origins computed what is asked before `forward`; and how many positions this run cannot know."""
    spans = run.spans()
    pieces = _pieces(spans, asked)
    length = (asked["end"] - asked["start"]).to_numpy(np.int64)
    lost = pieces.covered(len(asked)) < length
    unseen = 0
    if lost.any():
        nowhere = {"status": schema.REUSED, "phase": None, "row_start": -1, "row_step": 0}
        tokens = positions.expand(asked[lost].assign(forward_id=forward[lost], **nowhere))
        at = positions.find_computed(
            spans, tokens["origin_rid"], tokens["origin_attempt"].to_numpy(np.int64), tokens["position"].to_numpy()
        )
        elsewhere = segment.computed_elsewhere(run, tokens)
        bad = (at < 0) & ~elsewhere
        if bad.any():
            b = tokens.iloc[int(np.argmax(bad))]
            return f"{b['rid']} position {b['position']}: {b['origin_rid']} never computed it", 0
        unseen = int(((at < 0) & elsewhere).sum())
    late = pieces.forwards(spans) >= forward[pieces.asked]
    if late.any():
        i = int(np.argmax(late))
        s = asked.iloc[pieces.asked[i]]
        return (
            f"{s['rid']} position {pieces.end[i] - 1}: {what} by forward {forward[pieces.asked[i]]}, and its {who} "
            f"{s['origin_rid']} had not computed it before forward {pieces.forwards(spans)[i]}"
        ), unseen
    ranks = spans["dp_rank"].to_numpy()[pieces.span] != asked["dp_rank"].to_numpy()[pieces.asked]
    if ranks.any():
        s = asked.iloc[pieces.asked[int(np.argmax(ranks))]]
        return (
            f"{s['rid']} positions {s['start']} to {s['end']}: {s['origin_rid']} ran on another data-parallel rank",
            0,
        )
    return None, unseen


def _pieces(spans: pd.DataFrame, asked: pd.DataFrame) -> Pieces:
    attempt = asked["origin_attempt"].fillna(-1).to_numpy(np.int64)
    return computed_pieces(spans, asked["origin_rid"], attempt, asked["start"].to_numpy(), asked["end"].to_numpy())


def _replaced(run: Run, asked: pd.DataFrame, forward: Array) -> str | None:
    """An origin whose own entry was replaced by another's before cannot be what was reused.

    A request is rebound when the tree takes its entries and holds the same prefix already: from then on the tree has
    the other's entries alone.
    """
    rebinds = run.rebinds()
    if rebinds.empty or asked.empty:
        return None
    names = pd.Index(rebinds["rid"].unique())
    mine = pd.DataFrame(
        {
            "code": names.get_indexer(asked["origin_rid"]),
            "attempt": asked["origin_attempt"].to_numpy(float),
            "place": np.arange(len(asked)),
        }
    )
    theirs = pd.DataFrame({"code": names.get_indexer(rebinds["rid"]), "attempt": rebinds["attempt"].to_numpy(float)})
    theirs["rebind"] = np.arange(len(rebinds))
    pairs = mine[mine["code"] >= 0].merge(theirs, on=["code", "attempt"])
    a, r = asked.iloc[pairs["place"]], rebinds.iloc[pairs["rebind"]]
    overlap = (a["start"].to_numpy() < r["end"].to_numpy()) & (r["start"].to_numpy() < a["end"].to_numpy())
    bad = overlap & (r["at_forward"].to_numpy() <= forward[pairs["place"].to_numpy()])
    if bad.any():
        s, other = a.iloc[int(np.argmax(bad))], r.iloc[int(np.argmax(bad))]
        return (
            f"{s['rid']} positions {s['start']} to {s['end']}: the entry of {s['origin_rid']} was replaced at forward "
            f"{other['at_forward']} by that of {other['origin_rid']}, so that it is not what was found"
        )
    return None


def _same_tokens(prefixes: Prefixes, asked: pd.DataFrame) -> str | None:
    same = prefixes.same(asked["rid"], asked["origin_rid"], asked["end"].to_numpy(np.int64))
    if same.all():
        return None
    s = asked.iloc[int(np.argmin(same))]
    return f"{s['rid']} positions {s['start']} to {s['end']}: the tokens of origin {s['origin_rid']} differ"


def rebinds_hold(run: Run) -> Check:
    """A request is rebound only where it has an entry, to one that another request computed for the same tokens."""
    name = "rebinds"
    claim = "a rebound position was computed by both requests, after the same tokens, before it was rebound"
    rebinds = run.rebinds()
    known = rebinds[rebinds["origin_rid"].notna()]
    covered = int((known["end"] - known["start"]).sum())
    note, violation = _before_the_recording(run, rebinds, "rebound")
    if violation is None:
        violation = _rebound_after(run, known)
    at = known["at_forward"].to_numpy(np.int64)
    if violation is None:
        violation, _ = _computed_before(run, known, at, "rebound", "origin")
    violation = violation or _replaced(run, known, at)
    if violation is None and len(known):
        violation = _same_tokens(Prefixes(run), known)
    counted = run.manifest.get("facts") or {}
    found = int((rebinds["end"] - rebinds["start"]).sum())
    if violation is None and counted.get("rebound_positions", found) != found:
        violation = f"{found} positions were rebound, and the manifest counted {counted['rebound_positions']}"
    return Check(name, claim, covered, "positions", violation, note)


def _rebound_after(run: Run, rebinds: pd.DataFrame) -> str | None:
    """A rebound request had an entry: computed before, or reused (what was matched at admission may be rebound)."""
    spans, own = run.spans(), rebinds.assign(origin_rid=rebinds["rid"], origin_attempt=rebinds["attempt"])
    at = rebinds["at_forward"].to_numpy(np.int64)
    held = spans.assign(status=spans["status"].replace(schema.REUSED, schema.COMPUTED))
    entries = _pieces(held, own)
    short = entries.covered(len(own)) < (own["end"] - own["start"]).to_numpy(np.int64)
    late = np.zeros(len(own), dtype=bool)
    late[entries.asked[entries.forwards(held) >= at[entries.asked]]] = True
    if short.any():  # an entry of another segment, or a dropped one
        tokens = positions.expand(
            own[short].assign(forward_id=0, status=schema.REUSED, phase=None, row_start=-1, row_step=0)
        )
        at_span = positions.find_computed(
            held, tokens["rid"], tokens["attempt"].to_numpy(np.int64), tokens["position"].to_numpy()
        )
        missing = (at_span < 0) & ~segment.computed_elsewhere(run, tokens)
        if missing.any():
            t = tokens.iloc[int(np.argmax(missing))]
            return f"{t['rid']} position {t['position']}, rebound: it had not computed it"
    if late.any():
        r = rebinds.iloc[int(np.argmax(late))]
        where = f"{r['rid']} positions {r['start']} to {r['end']}, rebound at forward {r['at_forward']}"
        return f"{where}: it had not computed it"
    return None
