"""The online audit: a share of what a live server reused is computed again, and compared.

A sidecar of a recorded server. It reads segments of the live recording as they are closed (`privacy: ids`), draws
requests that reused something, and asks the server three greedy requests of one token for each, with log-probabilities
of the tokens after the border of reuse:

* a *warm twin*, the same tokens without a salt, which reuses the entries that the request reused;
* two *cold twins*, each with a salt of its own, which compute everything.

The request itself is never touched. A warm twin that reuses less than the request did says nothing: the entries have
gone, or are another namespace's. The criterion is the gate's (`sglang_probe.gate.judge`): the median |difference| to
*both* cold twins is larger than `T_i = max(FACTOR * max(Y, Y_i), LEAST[dtype])`, Y_i the median between the two cold
twins themselves, and Y the largest of these so far, none of them counted for more than `SPREAD` times the middle one;
nothing is judged before `WARM_UP` pairs. A warm twin whose log-probabilities are no numbers, where those of the
cold ones are, is past any threshold. What is past T is asked once more, and only what is past it again is an alarm: a
wrong entry stays wrong as long as it is cached. A warm twin that is refused twice, where the cold ones were answered,
is `no answer`. `docs/evidence/gate.md` has level and power.

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sglang_probe.gate.arms import Cold
from sglang_probe.gate.client import Answer, Client, Facts, Ids, RefusedError
from sglang_probe.gate.compare import compare
from sglang_probe.gate.judge import FACTOR, LEAST, yardstick_of
from sglang_probe.run import schema
from sglang_probe.run.run import Run

PREFIX = "probe-audit-"
"""Twins are named so, and are no candidates themselves."""
WARM_UP = 12
LEAST_REUSED, LEAST_TAIL = 16, 12
"""Tokens that a candidate reused, and that it has after them."""
Found = Literal["right", "wrong", "not confirmed", "gone", "too early", "no answer", "refused", "no room"]
JUDGED: tuple[Found, ...] = ("right", "wrong", "not confirmed")


@dataclass(frozen=True)
class Candidate:
    """A request that reused something."""

    rid: str
    prompt: Ids
    border: int
    origins: tuple[str, ...]
    """`request [start, end)` of each span that it reused, as the ledger has them."""

    @property
    def computed(self) -> int:
        """Tokens that its twins compute: a tail, and two whole prompts."""
        return 3 * len(self.prompt) - self.border

    @property
    def filled(self) -> int:
        """Tokens of the cache that its twins fill for nobody else: two whole prompts."""
        return 2 * len(self.prompt)

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


class _Moved(NamedTuple):
    nats: float
    past: bool
    """The threshold."""


def candidates(run: Run) -> list[Candidate]:
    """Requests of a closed segment that reused a prefix, in the order in which they were recorded.

    Left out: twins of earlier audits, requests without token ids, and those under an intervention: their entries are
    others' on purpose.
    """
    spans = run.spans()
    spans = spans[spans["attempt"] == 0]
    changed = set(spans["rid"][spans["intervention"].notna()])
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
        found.append(Candidate(str(row.rid), tuple(map(int, row.prompt_ids)), border, origins))
    return found


class Auditor:
    """Audits candidates one after another.

    Args:
        cold: how a cold twin is kept from reusing; not `flush`, which would empty everybody's cache.
        room: whether the engine has nothing to do.
        tokens_per_minute: what twins may compute and take of the cache, together.
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
        self._free_at, self._until = clock(), until
        self.computed, self.filled = 0, 0
        """Tokens that twins may have computed so far, and that they may have taken of the cache."""

    @property
    def threshold(self) -> float:
        """T as of now, nats: that of a request whose own cold twins are no further apart than Y."""
        return max(FACTOR * yardstick_of(self._pairs), self._least) if self._pairs else self._least

    def audit(self, candidate: Candidate) -> Audited:
        """Ask the twins of one request, as soon as there is room and budget."""
        first = self._moved(candidate)
        found: Found
        early = len(self._pairs) < WARM_UP
        if isinstance(first, str) and first != "no answer":
            found, least = first, math.nan
        elif not isinstance(first, str) and (not first.past or (early and math.isfinite(first.nats))):
            found, least = "too early" if early else "right", first.nats
        else:  # once more
            both = (first, self._moved(candidate))
            moved = [m for m in both if not isinstance(m, str)]
            least = min((m.nats for m in moved), default=math.nan)
            if len(moved) == 2 and all(m.past for m in moved):
                found = "wrong"
            else:
                found = "no answer" if both == ("no answer", "no answer") else "not confirmed"
        origins = candidate.origins if found in ("wrong", "no answer") else ()
        return Audited(candidate.rid, found, candidate.border, least, self.threshold, origins)

    def _moved(self, c: Candidate) -> _Moved | Found:
        """How far the warm twin is from the nearer cold one, or why that is not known."""
        if not self._wait(c):
            return "no room"
        try:
            warm = self._ask(c, {})
        except RefusedError:
            warm = None
        if warm is not None and (warm.cached is None or warm.cached < c.border):
            return "gone"
        try:
            colds = [self._ask(c, {self._cold: f"{PREFIX}{uuid.uuid4().hex}"}) for _ in range(2)]
        except RefusedError:
            return "refused"
        if any(a.cached for a in colds):
            return "gone"
        if not all(a.finite for a in colds):
            return "refused"
        own = compare(*colds, outputs=False).typical
        bisect.insort(self._pairs, own)
        if warm is None:
            return "no answer"
        nats = min(compare(a, warm, outputs=False).typical for a in colds) if warm.finite else math.inf
        return _Moved(nats, nats > max(self.threshold, FACTOR * own))

    def _ask(self, c: Candidate, salt: dict[str, str]) -> Answer:
        rid = f"{PREFIX}{uuid.uuid4().hex}"
        return self._client.ask(c.prompt, new=1, start=c.border, salt=salt, rid=rid)

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
