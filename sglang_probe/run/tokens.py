"""From spans to positions, and from a reused position to the row of its origin.

Spans `[start, end)` are frames with the columns of `schema.SPANS`; position frames are those of `expand`, which
`read_tokens` extends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run import schema
from sglang_probe.run.files import RunFiles

Array = np.ndarray[Any, Any]


def read_tokens(run: RunFiles, *, interrupted: bool) -> pd.DataFrame:
    """See `Run.tokens`."""
    requests = run.requests(interrupted=interrupted)
    spans = run.last_attempt()
    tokens = _positions(run, spans[spans["rid"].isin(requests["rid"])])
    return tokens.merge(_labels(requests), on=["rid", "position"], how="left", validate="many_to_one")


def iter_tokens(run: RunFiles, positions: int) -> Iterator[pd.DataFrame]:
    """What `read_tokens` gives without interrupted requests, some requests at a time: of so many positions, or of one
    request. For runs whose frame would be large; the index begins again with each."""
    requests = run.requests().sort_values("rid", kind="stable", ignore_index=True)
    for some, tokens in iter_positions(run, requests, positions):
        yield tokens.merge(_labels(some), on=["rid", "position"], how="left", validate="many_to_one")


def iter_positions(
    run: RunFiles, requests: pd.DataFrame, positions: int
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Requests in their order, so many positions or one request at a time; each time the requests, and the columns of
    `read_tokens` but token id and segment, ordered by rid and position. Spans are looked up once for all of them."""
    every = run.spans()
    spans = every[every["attempt"] == every.groupby("rid")["attempt"].transform("max")]
    ends = spans.groupby("rid")["end"].max().reindex(requests["rid"]).fillna(0).cumsum().to_numpy()
    part = pd.Series((ends - 1) // positions, index=requests["rid"].to_numpy())
    of_part = dict(list(spans.groupby(spans["rid"].map(part), sort=False)))
    computed = Computed(every)
    for number, some in requests.groupby(part.to_numpy(), sort=True):
        if number in of_part:
            tokens = expand(of_part.pop(number))
            tokens["source_row"], tokens["covered"] = sources(tokens, computed)
            yield some, tokens


def tokens_of(run: RunFiles, rid: str) -> pd.DataFrame:
    """See `Run.tokens_of`.

    Raises:
        RunDirectoryError: there is no such request.
    """
    spans = run.last_attempt()
    mine = spans[spans["rid"] == rid]
    if mine.empty:
        raise RunDirectoryError(f"{run.path} has no request `{rid}`", fix="`run.requests()` lists them")
    return _positions(run, mine)


def expand(spans: pd.DataFrame) -> pd.DataFrame:
    """One row per position of the given spans: rid, attempt, position, status, phase, forward_id, row, origin_rid,
    origin_attempt, intervention; ordered by rid and position."""
    spans = spans.sort_values(["rid", "start"], kind="stable")
    lengths = (spans["end"] - spans["start"]).to_numpy()
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)

    def each(column: str) -> Array:
        return np.repeat(spans[column].to_numpy(), lengths)

    steps = np.isin(each("phase").astype(object), schema.STEP_PHASES)
    row_start = each("row_start")
    return pd.DataFrame(
        {
            "rid": each("rid"),
            "attempt": each("attempt"),
            "position": each("start") + inside,
            "status": each("status"),
            "phase": each("phase"),
            "forward_id": each("forward_id") + steps * inside,
            "row": np.where(row_start >= 0, row_start + each("row_step") * inside, -1),
            "origin_rid": each("origin_rid"),
            "origin_attempt": each("origin_attempt"),
            "intervention": each("intervention") if "intervention" in spans else None,
        }
    )


def sources(tokens: pd.DataFrame, spans: Computed) -> tuple[Array, Array]:
    """Where the activation of each position is: its own row, or that of the position it was reused from, -1 if none was
    captured; and whether its forward pass is in this run at all."""
    rows = tokens["row"].to_numpy().copy()
    covered = (tokens["status"] == schema.COMPUTED).to_numpy().copy()
    reused = ((tokens["status"] == schema.REUSED) & tokens["origin_rid"].notna()).to_numpy()
    if reused.any():
        asked = tokens[reused]
        position = asked["position"].to_numpy()
        at = spans.find(asked["origin_rid"], asked["origin_attempt"].to_numpy(np.int64), position)
        hit = at >= 0
        rows[reused] = spans.rows_at(np.where(hit, at, 0), position, hit)
        covered[reused] = hit
    return rows, covered


def find_computed(spans: pd.DataFrame, rid: pd.Series, attempt: Array, position: Array) -> Array:
    """Index (by place in `spans`) of the computed span that holds each asked position; -1 where none does."""
    return Computed(spans).find(rid, attempt, position)


class Computed:
    """The computed spans of a run, to be found by what they hold.

    Within one attempt every position is computed at most once, so there is at most one.
    """

    def __init__(self, spans: pd.DataFrame) -> None:
        place = np.flatnonzero((spans["status"] == schema.COMPUTED).to_numpy())
        computed = spans.iloc[place]
        codes, names = pd.factorize(computed["rid"])
        self._names = pd.Index(names)
        key = _key(codes, computed["attempt"].to_numpy(), computed["start"].to_numpy())
        order = np.argsort(key, kind="stable")
        self._key, self._place = key[order], place[order]
        self._end = computed["end"].to_numpy()[order]
        self._start, self._row_start, self._row_step = (spans[c].to_numpy() for c in ("start", "row_start", "row_step"))

    def find(self, rid: pd.Series, attempt: Array, position: Array) -> Array:
        """Place in the frame of the span that holds each asked position; -1 where none does."""
        if not len(self._key):
            return np.full(len(position), -1)
        code = self._names.get_indexer(rid)
        asked = _key(code, attempt, position)
        at = np.searchsorted(self._key, asked, side="right") - 1
        valid = (at >= 0) & (code >= 0)
        at = np.where(valid, at, 0)
        valid &= (self._key[at] >> 32 == asked >> 32) & (position < self._end[at])
        return np.where(valid, self._place[at], -1)

    def rows_at(self, place: Array, position: Array, hit: Array) -> Array:
        """Row of each position in the span at `place`; -1 where none was captured, or where it is no `hit`."""
        start = self._row_start[place]
        row = start + (position - self._start[place]) * self._row_step[place]
        return np.where(hit & (start >= 0), row, -1)


def prompt_lengths(run: RunFiles, rids: pd.Series) -> Array:
    """Prompt length of the request of each entry, int64 `[len(rids)]`; -1 where this run does not know it."""
    requests = run.requests(interrupted=True)
    lengths = dict(zip(requests["rid"], requests["prompt_len"], strict=True))
    ended = run.engine_requests()
    lengths |= dict(zip(ended["rid"], ended["prompt_len"], strict=True))
    return rids.map(lengths).fillna(-1).to_numpy(np.int64)


def _positions(run: RunFiles, spans: pd.DataFrame) -> pd.DataFrame:
    tokens = expand(spans)
    tokens["source_row"], tokens["covered"] = sources(tokens, Computed(run.spans()))
    return tokens


def _labels(requests: pd.DataFrame) -> pd.DataFrame:
    """Token id and segment of every position of every request."""
    ids, segments, lengths = [np.zeros(0, np.int32)], [np.zeros(0, object)], []
    for r in requests.itertuples():
        if r.prompt_ids is None:  # a live recording without token ids
            prompt = 0 if pd.isna(r.prompt_len) else int(r.prompt_len)
            mine = np.full(prompt + int(r.output_len), -1, dtype=np.int32)
        else:
            mine = np.concatenate([r.prompt_ids, [] if r.output_ids is None else r.output_ids]).astype(np.int32)
        segment = np.full(len(mine), "generated", dtype=object)
        for s in r.segments:
            segment[s["start"] : s["end"]] = s["name"]
        ids.append(mine)
        segments.append(segment)
        lengths.append(len(mine))
    total = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return pd.DataFrame(
        {
            "rid": pd.Series(np.repeat(requests["rid"].to_numpy(), lengths), dtype="str"),
            "position": np.arange(total[-1]) - np.repeat(total[:-1], lengths),
            "token_id": np.concatenate(ids),
            "segment": pd.Series(np.concatenate(segments), dtype="str"),
        }
    )


def _key(code: Array, attempt: Array, position: Array) -> Array:
    return (code.astype(np.int64) << 12 | attempt.astype(np.int64)) << 32 | position.astype(np.int64)
