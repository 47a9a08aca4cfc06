"""The online audit: a share of what a live server reused is computed again, and compared.

A sidecar of a recorded server. It reads segments of the live recording as they are closed (`privacy: ids`), draws
requests that reused something, and asks the server three greedy requests of one token for each, with log-probabilities
of the tokens after the border of reuse:

* a *warm twin*, the same tokens without a salt, which reuses the entries that the request reused;
* two *cold twins*, each with a salt of its own, which compute everything. One has a few tokens more at its end, so that
  what the two differ by has the rounding of other shapes in it, as a prefill that begins at a border has.

The request itself is never touched. A warm twin that reuses less than the request did says nothing: the entries have
gone, or are another namespace's. The criterion is the gate's (`sglang_probe.gate.judge`): the median |difference| to
*both* cold twins is larger than `T_i = max(FACTOR * max(Y, Y_i), LEAST[dtype])`, Y_i the median between the two cold
twins themselves, and Y the largest of these so far, none of them counted for more than `SPREAD` times the middle one;
nothing is judged before `WARM_UP` pairs. A warm twin whose log-probabilities are no numbers, where those of the
cold ones are, is past any threshold. What is past T is asked once more, and only what is past it again is an alarm: a
wrong entry stays wrong as long as it is cached. A warm twin that is refused twice, where the cold ones were answered,
is `no answer`. `docs/evidence/gate.md` has level and power.

Where the server hands out rows (`asks: [rows]`), those of the twins after the border are compared as well, at each hook
point that it records (`sglang_probe.gate.rows`), and so are the rows that were recorded of the request itself. Past the
threshold there the request was answered over wrong entries, whatever is cached now: `was wrong`, or `was right` where
its entries have gone since.

Serving first: an audit begins only while nothing is in flight, and costs so many tokens a minute at most: those that
twins compute, and those that they take of the cache. SGLang caches whatever it computes: after each audit the cache has
two whole prompts more, under salts that nobody asks again, and a cache that is full evicts entries of clients for them.
Nothing of a prompt is kept: an audit's record has ids of requests, positions and numbers.
"""

from __future__ import annotations

import bisect
import math
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from sglang_probe.client import FetchedRows, ask_rows
from sglang_probe.errors import RunDirectoryError
from sglang_probe.gate.arms import Cold
from sglang_probe.gate.client import Answer, Client, Facts, Ids, RefusedError
from sglang_probe.gate.compare import compare
from sglang_probe.gate.judge import FACTOR, LEAST, yardstick_of
from sglang_probe.gate.rows import MOST_POSITIONS, Floor, Held, Moved, Rows
from sglang_probe.run import schema
from sglang_probe.run.run import Run

PREFIX = "probe-audit-"
"""Twins are named so, and are no candidates themselves."""
WARM_UP = 12
LEAST_REUSED, LEAST_TAIL = 16, 12
"""Tokens that a candidate reused, and that it has after them."""
MORE = 16
"""Tokens that the second cold twin has more."""
Found = Literal[
    "right", "wrong", "not confirmed", "was right", "was wrong", "gone", "too early", "no answer", "refused", "no room"
]
JUDGED: tuple[Found, ...] = ("right", "wrong", "not confirmed", "was right", "was wrong")
ALARMS: tuple[Found, ...] = ("wrong", "was wrong")


@dataclass(frozen=True)
class Candidate:
    """A request that reused something."""

    rid: str
    prompt: Ids
    border: int
    origins: tuple[str, ...]
    """`request [start, end)` of each span that it reused, as the ledger has them."""
    rows: Callable[[], Rows] = field(default=dict, compare=False)
    """Reads what was recorded of it after the border; empty: nothing was, or it is not comparable."""

    @property
    def computed(self) -> int:
        """Tokens that its twins compute at most: a tail, and two whole prompts, one with more."""
        return 3 * len(self.prompt) - self.border + MORE

    @property
    def filled(self) -> int:
        """Tokens of the cache that its twins fill for nobody else: two whole prompts."""
        return 2 * len(self.prompt) + MORE

    @property
    def cost(self) -> int:
        """Of the budget."""
        return self.computed + self.filled


@dataclass(frozen=True)
class Audited:
    """What one audit said."""

    rid: str
    found: Found
    border: int
    moved: float
    """Median |difference| of the warm twin to the nearer cold one, nats; NaN where it was not asked, infinite where its
    log-probabilities are no numbers."""
    threshold: float
    origins: tuple[str, ...] = ()
    """Of what is wrong."""
    rows: Moved | None = None
    """How far rows were from those of computed entries: of the warm twin, or where the request was wrong or its entries
    are gone, of the request; None: not compared."""


class _Seen(NamedTuple):
    """What the twins of one asking said."""

    nats: float
    """Of the warm twin; NaN: its entries are gone."""
    past: bool
    """Log-probabilities are past the threshold."""
    rows: Moved | None
    """Of the warm twin."""
    request: Moved | None
    """Rows of the request itself."""

    @property
    def wrong(self) -> bool:
        return self.past or (self.rows is not None and self.rows.past)

    @property
    def was_wrong(self) -> bool:
        return self.request is not None and self.request.past

    @property
    def finite(self) -> bool:
        return math.isfinite(self.nats) and (self.rows is None or math.isfinite(self.rows.distance))


class _Twin(NamedTuple):
    answer: Answer
    rows: Rows


def candidates(run: Run) -> list[Candidate]:
    """Requests of a closed segment that reused a prefix, in the order in which they were recorded.

    Left out: twins of earlier audits, requests without token ids, and those under an intervention: their entries are
    others' on purpose.
    """
    spans = run.spans()
    spans = spans[spans["attempt"] == 0]
    changed = set(spans["rid"][spans["intervention"].notna()])
    once = _comparable(run)
    reused = spans[spans["status"] == schema.REUSED].sort_values(["rid", "start"])
    of = dict(iter(reused.groupby("rid", sort=False)))
    found = []
    for row in run.requests().itertuples():
        part = of.get(row.rid)
        if part is None or row.prompt_ids is None or row.rid in changed or str(row.rid).startswith(PREFIX):
            continue
        border = int(part["end"].max())
        if border < LEAST_REUSED or len(row.prompt_ids) - border < LEAST_TAIL:
            continue
        origins = tuple(
            f"{s.origin_rid if isinstance(s.origin_rid, str) else 'before the recording'} [{s.start}, {s.end})"
            for s in part.itertuples()
        )
        rows = partial(_recorded, run, str(row.rid), border, len(row.prompt_ids)) if row.rid in once else dict
        found.append(Candidate(str(row.rid), tuple(map(int, row.prompt_ids)), border, origins, rows))
    return found


def _comparable(run: Run) -> set[str]:
    """Requests whose rows are those that a twin without a salt computes: under no salt, key or adapter, never
    retracted, nothing of them evicted by a kept set."""
    tree = run.tree()
    matched = tree[tree["event"] == schema.MATCHED]
    elsewhere = set(matched["rid"][matched["namespace"].notna() | (matched["attempt"] > 0)])
    requests = run.requests()
    evicts = set(requests["rid"][requests["evict"].notna()]) if "evict" in requests else set()
    return set(matched["rid"]) - elsewhere - evicts if run.hook_points else set()


def _recorded(run: Run, rid: str, border: int, end: int) -> Rows:
    """Rows that a run has of a request's first positions after the border; empty where the segment is gone by now."""
    found = {}
    try:
        tokens = run.tokens_of(rid)
        tokens = tokens[(tokens["position"] >= border) & (tokens["position"] < min(end, border + MOST_POSITIONS))]
        tokens = tokens[(tokens["status"] == schema.COMPUTED) & (tokens["row"] >= 0)].sort_values("position")
        for name in run.hook_points:
            own = tokens[run.holds(name, tokens["row"].to_numpy())]
            rows = run.rows(name, own["row"].to_numpy()).float().numpy()
            found[name] = Held(own["position"].to_numpy(np.int64), rows)
    except (RunDirectoryError, OSError):
        return {}
    return found


class Auditor:
    """Audits candidates one after another.

    Args:
        cold: how a cold twin is kept from reusing; not `flush`, which would empty everybody's cache.
        room: whether the engine has nothing to do.
        tokens_per_minute: what twins may compute and take of the cache, together.
        fetch: gets the rows that a request asked for (`sglang_probe.client.fetch_rows`; None: there are none); default:
            the server hands out no rows.
        until: on `clock`; from then on no audit begins, and none waits.
        clock, sleep: of the budget.
    """

    def __init__(
        self,
        client: Client,
        facts: Facts,
        cold: Cold,
        *,
        room: Callable[[], bool],
        tokens_per_minute: float = 20_000,
        fetch: Callable[[Mapping[str, Any]], FetchedRows | None] | None = None,
        until: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if cold == "flush":
            raise ValueError("an audit never flushes")
        self._client, self._cold, self._room = client, cold, room
        self._rate, self._clock, self._sleep = tokens_per_minute / 60, clock, sleep
        self._least = LEAST.get((facts.dtype or "").removeprefix("torch."), LEAST["bfloat16"])
        self._pairs: list[float] = []  # differences of cold twins, ascending
        self._fetch, self._context = fetch, facts.context
        self._floor = Floor(facts.dtype, facts.further.get("kv_cache_dtype"))
        self.without_rows = 0
        """Twins that were answered and whose rows were asked for in vain."""
        self._free_at, self._until = clock(), until
        self.computed, self.filled = 0, 0
        """Tokens that twins may have computed so far, and that they may have taken of the cache."""

    @property
    def threshold(self) -> float:
        """T as of now, nats: that of a request whose own cold twins are no further apart than Y."""
        return max(FACTOR * yardstick_of(self._pairs), self._least) if self._pairs else self._least

    def audit(self, candidate: Candidate) -> Audited:
        """Ask the twins of one request, as soon as there is room and budget."""
        first = self._ask_twins(candidate)
        early = len(self._pairs) < WARM_UP
        rows = None if isinstance(first, str) else first.rows
        found: Found
        if isinstance(first, str) and first != "no answer":
            found, least = first, math.nan
        elif not isinstance(first, str) and math.isnan(first.nats):
            found, least, rows = "was wrong" if first.was_wrong else "was right", math.nan, first.request
            found = "too early" if early else found
        elif not isinstance(first, str) and (not first.wrong or (early and first.finite)):
            found, least = "too early" if early else "right", first.nats
            if not early and first.was_wrong:
                found, rows = "was wrong", first.request
        else:  # once more
            both = (first, self._ask_twins(candidate))
            seen = [s for s in both if not isinstance(s, str) and not math.isnan(s.nats)]
            least = min((s.nats for s in seen), default=math.nan)
            if len(seen) == 2 and all(s.wrong for s in seen):
                found, rows = "wrong", min((s.rows for s in seen if s.rows), key=lambda m: m.past, default=None)
            else:
                found = "no answer" if both == ("no answer", "no answer") else "not confirmed"
        origins = candidate.origins if found in (*ALARMS, "no answer") else ()
        return Audited(candidate.rid, found, candidate.border, least, self.threshold, origins, rows)

    def _ask_twins(self, c: Candidate) -> _Seen | Found:
        """How far the warm twin, and the request, are from the nearer cold one, or why that is not known."""
        if not self._wait(c):
            return "no room"
        try:
            warm = self._ask(c, c.prompt, {})
        except RefusedError:
            warm = None
        gone = warm is not None and (warm.answer.cached is None or warm.answer.cached < c.border)
        recorded = c.rows() if self._fetch is not None else {}
        if gone and not recorded:
            return "gone"
        room = MORE if self._context is None else max(min(MORE, self._context - len(c.prompt) - 1), 0)
        longer = c.prompt + c.prompt[-room:] if room else c.prompt
        try:
            cold = [self._ask(c, ids, {self._cold: f"{PREFIX}{uuid.uuid4().hex}"}) for ids in (c.prompt, longer)]
        except RefusedError:
            return "refused"
        if any(t.answer.cached for t in cold):
            return "gone"
        if not all(t.answer.finite for t in cold):
            return "refused"
        answers, colds = [t.answer for t in cold], [t.rows for t in cold]
        own = compare(*answers, outputs=False).typical
        bisect.insort(self._pairs, own)
        self._floor.add(colds)
        request = self._floor.moved(recorded, colds)
        if gone:
            return "gone" if request is None else _Seen(math.nan, False, None, request)
        if warm is None:
            return "no answer"
        w = warm.answer
        nats = min(compare(a, w, outputs=False).typical for a in answers) if w.finite else math.inf
        past = nats > max(self.threshold, FACTOR * own)
        return _Seen(nats, past, self._floor.moved(warm.rows, colds), request)

    def _ask(self, c: Candidate, ids: Ids, salt: dict[str, str]) -> _Twin:
        rid, asked = f"{PREFIX}{uuid.uuid4().hex}", None
        if self._fetch is not None:
            asked = ask_rows(windows=[(c.border, min(len(c.prompt), c.border + MOST_POSITIONS))])
        given: dict[str, Any] = {"new": 1, "start": c.border, "salt": salt, "rid": rid}
        try:
            answer = self._client.ask(ids, asks=asked, **given)
        except RefusedError as e:
            if asked is None or e.status != 400:
                raise
            answer = self._client.ask(ids, **given)  # more rows than the server gives to a request
            self.without_rows += 1
            return _Twin(answer, {})
        if self._fetch is None or asked is None:
            return _Twin(answer, {})
        fetched = self._fetch(asked)
        if fetched is None:
            self.without_rows += 1
            return _Twin(answer, {})
        held = {h: Held(fetched.position[fetched.has_row[h]], fetched[h][fetched.has_row[h]]) for h in fetched}
        return _Twin(answer, held)

    def _wait(self, c: Candidate) -> bool:
        """Until the budget has so much, and nothing is in flight; false where that is not before the end."""
        while (left := self._free_at - self._clock()) > 0 or not self._room():
            if self._clock() >= self._until:
                return False
            self._sleep(min(left if left > 0 else 0.2, self._until - self._clock()))
        if self._clock() >= self._until:
            return False
        self._free_at = max(self._free_at, self._clock()) + c.cost / self._rate
        self.computed += c.computed
        self.filled += c.filled
        return True


def drawn(
    closed: Callable[[], Iterable[tuple[str, Callable[[], list[Candidate]]]]],
    *,
    share: float,
    seed: int = 0,
    once: bool = False,
    until: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[str, Candidate]]:
    """The requests to audit with their segments, as these are closed.

    Args:
        closed: names of the segments that are closed by now, and what reads the candidates of each.
        share: of the candidates.
        once: end after those that are closed already.
        until: on `clock`; then it ends, whatever is left.
    """
    rng, seen = random.Random(seed), set[str]()
    while True:
        for name, read in closed():
            if name in seen:
                continue
            seen.add(name)
            for one in (c for c in read() if rng.random() < share):
                if clock() >= until:
                    return
                yield name, one
        if once or clock() >= until:
            return
        sleep(min(2.0, max(0.0, until - clock())))


def idle(client: Client) -> bool:
    """Whether a recorded server has no request in flight; false where it does not say."""
    try:
        told = client.call("/probe/status", None)
    except RefusedError:
        return False
    return isinstance(told, dict) and told.get("requests_in_flight") == 0
