"""Why a prefill computed each of its tokens: every position has exactly one cause (`Cause`).

Everything is told from the tables of the run and the prompts, after the fact. The table `tree` says in one order when
each request asked the radix tree for its prefix, what the tree held at which moment, and when it lost entries. With
`seen` = the longest prefix that an earlier request of the same namespace has, and `held` = the longest prefix that the
tree had at any earlier moment, both before the request asked:

* a position below `held` could have been given: it was evicted or flushed, or lies past what the request could take;
* a position below `seen` and not below `held` was in no whole page of the tree: not published yet, never published, or
  part of a page that is not shared whole;
* a position from `seen` on is new: another namespace has the same prefix, or its text was computed after another
  prefix (diverged), or nobody asked it before (never seen).
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.run.shared_prefixes import Match, SharedPrefixes, prefix_hashes

Array = np.ndarray[Any, Any]


class Cause(StrEnum):
    """Why a position was computed."""

    NEVER_SEEN = "never seen"
    """No earlier request holds these tokens."""
    NOT_IN_SEGMENT = "not seen in this segment"
    """No earlier request of this segment of a live recording holds these tokens; those of earlier segments may."""
    DIVERGED = "diverged"
    """An earlier request holds this text, after another prefix."""
    EVICTED = "evicted"
    WINDOW = "window lost"
    """The tree held these positions and had dropped the entries of the sliding layers, which have a pool of their own,
    without evicting anything else."""
    FLUSHED = "flushed"
    """The cache was emptied on demand or with an update of the weights, or the recording began again."""
    PAGE_ROUNDING = "page rounding"
    """The tokens are shared, and the page that they are in is not shared whole."""
    NOT_YET_PUBLISHED = "not yet published"
    """The request that has the same prefix was still in flight."""
    NEVER_PUBLISHED = "never published"
    """The request that has the same prefix did not give its entries to the tree: it asked so, or it was aborted or
    retracted, or the recording ended before."""
    NAMESPACE = "namespace"
    """The same prefix was computed under another salt, key, adapter or steering."""
    LAST_TOKEN = schema.LAST_TOKEN
    """The last token of a prompt is always computed."""
    LOGPROB_START = schema.LOGPROBS
    """Log-probabilities were asked from here on."""
    ASKED = schema.ASKED
    """The request asked to read no more from the cache (`probe: {cache: ...}`)."""
    CACHE_OFF = schema.CACHE_OFF
    RETRACTION = "retraction"
    """Computed before in an earlier attempt of the same request."""
    UNKNOWN = "not known"
    """The request asked the tree before this recording, or segment, began; or its prompt is not in the run."""


CAUSES = tuple(Cause)


@dataclass(frozen=True)
class Autopsy:
    """Causes of all positions that prefills computed."""

    pieces: pd.DataFrame
    """One row per run of positions: dp_rank, rid, attempt, start, end, forward_id, cause, nearest (the earlier request
    with the longest common prefix, the latest of these; null: none), common (tokens of that prefix), and of evicted
    ones since (order of the last event of `tree` at which the tree had the position) and until (order of the match)."""
    text_known: bool
    """Whether token ids were there: without them whatever follows a divergence counts as diverged, as far as the
    nearest request is long."""

    def by_cause(self) -> dict[str, int]:
        """Positions of each cause that occurs, most first."""
        counts = (self.pieces["end"] - self.pieces["start"]).groupby(self.pieces["cause"]).sum()
        return {str(k): int(v) for k, v in counts.sort_values(ascending=False, kind="stable").items()}


def causes_known(run: Run) -> bool:
    """Whether the run holds what `autopsy` needs."""
    try:
        _tree_of(run)
        _sequences(run)
        page_size(run)
    except RunDirectoryError:
        return False
    return True


def autopsy(run: Run) -> Autopsy:
    """The cause of every position that a prefill of this run computed.

    Raises:
        RunDirectoryError: the run does not say: it was recorded before there was the table `tree`, or without prompts.
    """
    tree = _tree_of(run)
    names, ids, hashes, offsets, lengths = _shared(_sequences(run))
    spans = run.spans()
    page = page_size(run)
    pieces = []
    for rank, of_rank in spans.groupby("dp_rank", sort=True):
        events = tree[tree["dp_rank"] == rank]
        known = SharedPrefixes(names, ids, hashes, offsets, lengths, events)
        pieces += list(_of_rank(known, of_rank, int(str(rank)), page))
    columns = [
        "dp_rank",
        "rid",
        "attempt",
        "start",
        "end",
        "forward_id",
        "cause",
        "nearest",
        "common",
        "since",
        "until",
    ]
    found = pd.DataFrame(pieces, columns=columns)
    if later_segment(run):
        found["cause"] = found["cause"].replace(str(Cause.NEVER_SEEN), str(Cause.NOT_IN_SEGMENT))
    return Autopsy(found, ids is not None)


def later_segment(run: Run) -> bool:
    """Whether a run is a segment of a live recording that has others before it."""
    return bool((run.manifest.get("segment") or {}).get("number", 0))


def page_size(run: Run) -> int:
    """SGLang's page size, as the manifest says.

    Raises:
        RunDirectoryError: it does not say.
    """
    for key in ("server_resolved", "server"):
        size = (run.manifest.get(key) or {}).get("page_size")
        if isinstance(size, int) and size > 0:
            return size
    if "server_resolved" not in run.manifest:
        return 1
    raise RunDirectoryError(f"{run.path}: the manifest does not say the page size", fix="record the run again")


def _tree_of(run: Run) -> pd.DataFrame:
    tree = run.tree()
    if tree.empty:
        raise RunDirectoryError(
            f"{run.path}: not recorded: what the radix tree took, gave and lost (schema version "
            f"{run.manifest['schema_version']}; such runs tell what was computed, and not why)",
            fix="record it again with this release",
        )
    return tree


@dataclass(frozen=True)
class _Sequences:
    names: pd.Index
    entries: list[Array]
    """Of each request: token ids, or keyed hashes of its prefixes."""
    text: bool
    """Whether they are token ids."""


def _sequences(run: Run) -> _Sequences:
    """What each request was, prompt and output."""
    requests = run.requests(interrupted=True)
    asked = requests[(requests["prompt_len"].fillna(0) > 0) & (requests["finish_reason"] != schema.REFUSED)]
    with_ids = asked[asked["prompt_ids"].notna()]
    if any((np.asarray(ids) < 0).any() for ids in with_ids["prompt_ids"]):
        raise RunDirectoryError(
            f"{run.path}: token ids were withheld, so that which requests began alike is not known any more",
            fix="ask before `sglang-probe scrub`, of a copy",
        )
    if len(with_ids) or asked.empty:
        sequences = [
            np.concatenate([np.asarray(p, np.int64), np.asarray([] if o is None else o, np.int64)])
            for p, o in zip(with_ids["prompt_ids"], with_ids["output_ids"], strict=True)
        ]
        return _Sequences(pd.Index(with_ids["rid"]), sequences, True)
    prompts = run.prompts()
    prompts = prompts[prompts["prefix_hashes"].notna()].drop_duplicates("rid")
    if prompts.empty:
        raise RunDirectoryError(
            f"{run.path}: prompts were not recorded (privacy `{run.manifest.get('privacy', 'none')}`), so nobody can "
            "say which requests began alike",
            fix="record with `live: {privacy: hashes}`, which writes keyed hashes and no text, or with `ids`",
        )
    return _Sequences(pd.Index(prompts["rid"]), [np.asarray(h, np.uint64) for h in prompts["prefix_hashes"]], False)


def _shared(of: _Sequences) -> tuple[pd.Index, Array | None, Array, Array, Array]:
    """Names; token ids end to end, or None; prefix hashes end to end; where each sequence begins; its length."""
    lengths = np.array([len(s) for s in of.entries], dtype=np.int64)
    offsets = np.cumsum(lengths) - lengths
    if not of.text:
        return of.names, None, np.concatenate(of.entries), offsets, lengths
    ids = np.concatenate([*of.entries, np.empty(0, np.int64)])
    return of.names, ids, prefix_hashes(ids, offsets, lengths), offsets, lengths


def _of_rank(known: SharedPrefixes, spans: pd.DataFrame, rank: int, page: int) -> Iterator[tuple[Any, ...]]:
    prefills = spans[(spans["status"] == schema.COMPUTED) & spans["phase"].isin([schema.PREFILL, schema.RECOMPUTE])]
    done = spans[spans["status"] == schema.COMPUTED].groupby(["rid", "attempt"])["end"].max()
    earlier: dict[tuple[str, int], int] = {}
    furthest: dict[str, int] = {}
    for (rid, attempt), end in done.sort_index().items():
        earlier[rid, attempt] = furthest.get(rid, 0)
        furthest[rid] = max(furthest.get(rid, 0), int(end))
    number = prefills.groupby(["rid", "attempt"], sort=False).ngroup().to_numpy(np.int64)
    prefills = prefills.iloc[np.lexsort((prefills["start"].to_numpy(np.int64), number))]
    ends = prefills.groupby(["rid", "attempt"])["end"].max().to_dict()
    table, of = None, None
    columns = (prefills[c].tolist() for c in ("rid", "attempt", "start", "end", "forward_id"))
    for rid, attempt, start, end, forward in zip(*columns, strict=True):
        if table is None or of != (rid, attempt):
            of = (rid, attempt)
            table = _causes_of(known, str(rid), int(attempt), int(ends[of]), earlier.get(of, 0), page)
        codes, since = table.codes[start:end], table.since[start:end]
        cuts = np.flatnonzero((codes[1:] != codes[:-1]) | (since[1:] != since[:-1])) + 1
        for a, b in itertools.pairwise([0, *cuts.tolist(), len(codes)]):
            where = (int(start) + a, int(start) + b, int(forward))
            lost = (int(since[a]), table.until)
            yield (rank, rid, attempt, *where, str(CAUSES[codes[a]]), table.nearest, table.common, *lost)


@dataclass(frozen=True)
class _Table:
    codes: Array
    since: Array
    """Of what was lost, the last event at which the tree had the position; else -1."""
    nearest: str | None
    common: int
    until: int


def _causes_of(known: SharedPrefixes, rid: str, attempt: int, n: int, computed_before: int, page: int) -> _Table:
    """The causes of positions `[0, n)` of an attempt, if they are computed."""
    codes = np.full(n, _CODE[Cause.UNKNOWN], dtype=np.int8)
    since = np.full(n, -1, dtype=np.int64)
    match, i = known.matches.get((rid, attempt)), known.row_of.get(rid, -1)
    nearest, common, until = None, 0, -1
    if match is not None and i >= 0 and known.lengths[i] >= n:
        until = int(match.order)
        limit = n - 1 if pd.isna(match.limit) else int(match.limit)
        why = Cause(match.limited_by) if isinstance(match.limited_by, str) else Cause.LAST_TOKEN
        first = int(known.asked[i])
        seen, held = known.seen(i, n, first), known.held(i, n, until)
        elsewhere = known.seen_anywhere(i, n, first)
        seen = max(seen, held)
        _past(known, codes, i, seen, elsewhere, first)
        common = known.seen(i, known.lengths[i], first)
        r = known.nearest(i, common, first)
        nearest = None if r < 0 else str(known.names[r])
        if known.ids is None:
            longer = seen > 0 and r >= 0 and known.lengths[r] > seen
            codes[max(seen, elsewhere) :] = _CODE[Cause.NEVER_SEEN]
            if longer:
                codes[max(seen, elsewhere) : int(known.lengths[r])] = _CODE[Cause.DIVERGED]
        _below(known, codes, since, i, match, seen, held, limit, why, page)
    codes[:computed_before] = _CODE[Cause.RETRACTION]
    since[(codes != _CODE[Cause.EVICTED]) & (codes != _CODE[Cause.FLUSHED])] = -1
    return _Table(codes, since, nearest, common, until)


def _past(known: SharedPrefixes, codes: Array, i: int, seen: int, elsewhere: int, before: int) -> None:
    """Causes from the end of what was seen on."""
    codes[seen:] = _CODE[Cause.NEVER_SEEN]
    new = max(seen, elsewhere)
    if known.ids is not None and len(codes) > new:
        text = known.text_before(i, new, len(codes), before)
        codes[new:] = np.where(text, _CODE[Cause.DIVERGED], _CODE[Cause.NEVER_SEEN])
    codes[seen:new] = _CODE[Cause.NAMESPACE]


def _below(
    known: SharedPrefixes,
    codes: Array,
    since: Array,
    i: int,
    match: Match,
    seen: int,
    held: int,
    limit: int,
    why: Cause,
    page: int,
) -> None:
    """Causes of what was seen, and the last event at which the tree had what was lost."""
    given, until = int(match.end), int(match.order)
    whole = limit // page * page
    could = min(held // page * page, whole)  # a page that begins alike is another page
    shared = min(seen // page * page, whole)
    codes[given:seen] = _CODE[Cause.PAGE_ROUNDING]
    at = given
    while at < could:
        end, last = _lost_together(known, i, at, could, until, page)
        evicted, emptied = known.lost(last, until)
        # Whoever is evicted goes from the end on: what comes before was there when the tree was emptied.
        stayed = min(max(known.length_at(last) - evicted, at), end) if emptied else at
        lost = Cause.WINDOW if match.sliding and not evicted and not emptied else Cause.EVICTED
        codes[at:stayed], codes[stayed:end] = _CODE[Cause.FLUSHED], _CODE[lost]
        since[at:end] = last
        at = end
    if shared > at:
        codes[at:shared] = _CODE[Cause.NEVER_PUBLISHED]
        pages = (shared - at) // page  # whoever publishes a page later publishes those before it
        low = bisect_left(
            range(pages), True, key=lambda k: not known.published_after(i, at + (k + 1) * page - 1, until)
        )
        codes[at : at + low * page] = _CODE[Cause.NOT_YET_PUBLISHED]
    if limit < seen:
        codes[max(limit, given) : seen] = _CODE[why]


def _lost_together(known: SharedPrefixes, i: int, at: int, could: int, until: int, page: int) -> tuple[int, int]:
    """How far the pages from `at` on have the same last event at which the tree had them, and that event. Whoever has a
    page has those before it, so that the events of later pages are no later."""

    def last_had(k: int) -> int:
        return known.last_had(i, min(at + (k + 1) * page, could) - 1, until)

    last = last_had(0)
    alike = bisect_left(range(-(-(could - at) // page)), True, key=lambda k: last_had(k) < last)
    return min(at + alike * page, could), last


_CODE = {cause: i for i, cause in enumerate(CAUSES)}
