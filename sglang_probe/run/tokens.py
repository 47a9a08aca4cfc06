"""From spans to positions, and from a reused position to the row of its origin.

Spans `[start, end)` are frames with the columns of `schema.SPANS`; position frames are those of `expand`, which
`read_tokens` extends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

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


PART = 1 << 16
"""Positions of a part, where nothing else is asked: a frame of about 10 MB."""


def iter_tokens(run: RunFiles, positions: int = PART) -> Iterator[pd.DataFrame]:
    """See `Run.iter_tokens`."""
    yield from TokenFrames(run).parts(positions)


class TokenFrames:
    """Frames of `Run.tokens` of some requests at a time, for runs whose frame of all positions would be large.

    Held are the spans, and of each request its token ids (4 bytes a position) and segments, as they are stored.
    Requests in flight at a crash are left out.

    Raises:
        RunDirectoryError: the run cannot be read, or two requests have one id.
    """

    def __init__(self, run: RunFiles) -> None:
        table = run.requests_table(["rid", "index", "prompt_len", "output_len", "prompt_ids", "output_ids", "segments"])
        rids = table["rid"].to_pandas()
        order = np.argsort(rids.to_numpy(), kind="stable")
        self._table, self._place = table, order
        self.rids = rids.iloc[order].reset_index(drop=True)
        """Served requests in the order of the frames, by rid."""
        if not self.rids.is_unique:
            raise RunDirectoryError(
                f"{run.path} has request `{self.rids[self.rids.duplicated()].iloc[0]}` twice",
                fix="`sglang-probe verify` says what is wrong with the run",
            )
        self._spans = _Spans(run.spans(), self.rids)

    def parts(self, positions: int = PART) -> Iterator[pd.DataFrame]:
        """All of them in the order of `Run.tokens`: so many positions at a time, or one request."""
        for numbers in self._spans.parts(positions):
            yield self._frame(numbers)

    def of(self, rids: Any) -> pd.DataFrame:
        """Those of the given requests that were served, ordered by rid."""
        numbers = pd.Index(self.rids).get_indexer(rids)
        return self._frame(np.sort(numbers[numbers >= 0]))

    def _frame(self, numbers: Array) -> pd.DataFrame:
        labels = _labels(self._table.take(pa.array(self._place[numbers])).to_pandas())
        return self._spans.frame(numbers).merge(labels, on=["rid", "position"], how="left", validate="many_to_one")


def iter_positions(
    run: RunFiles, requests: pd.DataFrame, positions: int
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Requests in their order, so many positions or one request at a time; each time the requests, and the columns of
    `read_tokens` but token id and segment, ordered by rid and position. Spans are looked up once for all of them."""
    spans = _Spans(run.spans(), requests["rid"])
    for numbers in spans.parts(positions):
        yield requests.iloc[numbers], spans.frame(numbers)


class _Spans:
    """Spans of the last attempts of requests, to be expanded some requests at a time."""

    def __init__(self, every: pd.DataFrame, rids: pd.Series) -> None:
        last = (every["attempt"] == every.groupby("rid")["attempt"].transform("max")).to_numpy()
        number = pd.Index(rids).get_indexer(every["rid"])
        order = np.flatnonzero(last & (number >= 0))
        order = order[np.argsort(number[order], kind="stable")]
        self._every, self._order, self._computed = every, order, Computed(every)
        counts = np.bincount(number[order], minlength=len(rids))
        self._edges = np.concatenate([[0], np.cumsum(counts)])
        self._ends = np.zeros(len(rids), np.int64)
        np.maximum.at(self._ends, number[order], every["end"].to_numpy()[order])

    def parts(self, positions: int) -> Iterator[Array]:
        """Numbers of consecutive requests: of so many positions together, or of one; none without spans."""
        part = (np.cumsum(self._ends) - 1) // positions
        for numbers in np.split(np.arange(len(part)), np.flatnonzero(np.diff(part)) + 1):
            if len(numbers) and self._edges[numbers[0]] < self._edges[numbers[-1] + 1]:
                yield numbers

    def frame(self, numbers: Array) -> pd.DataFrame:
        """The positions of some requests, by ascending numbers."""
        places = [self._order[self._edges[n] : self._edges[n + 1]] for n in numbers.tolist()]
        tokens = expand(self._every.iloc[np.concatenate(places) if places else []])
        tokens["source_row"], tokens["covered"] = sources(tokens, self._computed)
        return tokens


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

    def names(column: str) -> Any:  # of one dtype, whether or not all of them are null
        return pd.Series(each(column) if column in spans else None, index=range(len(inside)), dtype="str")

    steps = np.isin(each("phase").astype(object), schema.STEP_PHASES)
    row_start = each("row_start")
    return pd.DataFrame(
        {
            "rid": each("rid"),
            "attempt": each("attempt"),
            "position": each("start") + inside,
            "status": each("status"),
            "phase": names("phase"),
            "forward_id": each("forward_id") + steps * inside,
            "row": np.where(row_start >= 0, row_start + each("row_step") * inside, -1),
            "origin_rid": names("origin_rid"),
            "origin_attempt": each("origin_attempt"),
            "intervention": names("intervention"),
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
