"""The online audit: a share of what a live server reused is computed again, and compared.

A sidecar of a recorded server. It reads segments of the live recording as they are closed (`privacy: ids`), draws
requests that reused something, and asks the server three greedy requests of one token for each, with log-probabilities
of the tokens after the border of reuse:

* a *warm twin*, the same tokens without a salt, which reuses the entries that the request reused;
* two *cold twins*, each with a salt of its own, which compute everything.

The request itself is never touched. A warm twin that reuses less than the request did says nothing: the entries have
gone, or are another namespace's. The criterion is the gate's (`sglang_probe.gate.judge`): the median |difference| to
*both* cold twins is larger than `T = max(FACTOR * Y, LEAST[dtype])`, Y the largest median between two cold twins so
far; nothing is judged before `WARM_UP` pairs. What is past T is asked once more, and only what is past it again is an
alarm: a wrong entry stays wrong as long as it is cached. `docs/evidence/gate.md` has level and power.

Serving first: an audit begins only while nothing is in flight, and costs so many tokens a minute at most. Nothing of a
prompt is kept: an audit's record has ids of requests, positions and numbers.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sglang_probe.gate.arms import Cold
from sglang_probe.gate.client import Answer, Client, Facts, Ids, RefusedError
from sglang_probe.gate.compare import compare
from sglang_probe.gate.judge import FACTOR, LEAST
from sglang_probe.run import schema
from sglang_probe.run.run import Run

PREFIX = "probe-audit-"
"""Twins are named so, and are no candidates themselves."""
WARM_UP = 12
LEAST_REUSED, LEAST_TAIL = 16, 12
"""Tokens that a candidate reused, and that it has after them."""
Found = Literal["right", "wrong", "not confirmed", "gone", "too early", "refused"]


@dataclass(frozen=True)
class Candidate:
    """A request that reused something."""

    rid: str
    prompt: Ids
    border: int
    origins: tuple[str, ...]
    """`request [start, end)` of each span that it reused, as the ledger has them."""

    @property
    def cost(self) -> int:
        """Tokens that its twins compute: a tail, and two whole prompts."""
        return 3 * len(self.prompt) - self.border


@dataclass(frozen=True)
class Audited:
    """What one audit said."""

    rid: str
    found: Found
    border: int
    moved: float
    """Median |difference| of the warm twin to the nearer cold one, nats; NaN where it was not asked."""
    threshold: float
    origins: tuple[str, ...] = ()
    """Of what is wrong."""


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
        tokens_per_minute: what twins may compute.
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
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if cold == "flush":
            raise ValueError("an audit never flushes")
        self._client, self._cold, self._room = client, cold, room
        self._rate, self._clock, self._sleep = tokens_per_minute / 60, clock, sleep
        self._least = LEAST.get((facts.dtype or "").removeprefix("torch."), LEAST["bfloat16"])
        self._pairs, self._yardstick = 0, 0.0
        self._free_at = clock()
        self.computed = 0
        """Tokens that twins may have computed so far."""

    @property
    def threshold(self) -> float:
        """T as of now, nats."""
        return max(FACTOR * self._yardstick, self._least)

    def audit(self, candidate: Candidate) -> Audited:
        """Ask the twins of one request, as soon as there is room and budget."""
        try:
            moved = self._moved(candidate)
            if moved is None:
                return Audited(candidate.rid, "gone", candidate.border, float("nan"), self.threshold)
            if self._pairs < WARM_UP:
                return Audited(candidate.rid, "too early", candidate.border, moved, self.threshold)
            if moved <= self.threshold:
                return Audited(candidate.rid, "right", candidate.border, moved, self.threshold)
            again = self._moved(candidate)
        except RefusedError:
            return Audited(candidate.rid, "refused", candidate.border, float("nan"), self.threshold)
        wrong = again is not None and again > self.threshold
        found: Found = "wrong" if wrong else "not confirmed"
        least = moved if again is None else min(moved, again)
        return Audited(
            candidate.rid, found, candidate.border, least, self.threshold, candidate.origins if wrong else ()
        )

    def _moved(self, c: Candidate) -> float | None:
        self._wait(c.cost)
        warm = self._ask(c, {})
        if warm.cached is None or warm.cached < c.border:
            return None
        colds = [self._ask(c, {self._cold: f"{PREFIX}{uuid.uuid4().hex}"}) for _ in range(2)]
        if any(a.cached for a in colds):
            return None
        self._pairs += 1
        self._yardstick = max(self._yardstick, compare(*colds, outputs=False).typical)
        return float(min(compare(a, warm, outputs=False).typical for a in colds))

    def _ask(self, c: Candidate, salt: dict[str, str]) -> Answer:
        rid = f"{PREFIX}{uuid.uuid4().hex}"
        return self._client.ask(c.prompt, new=1, start=c.border, salt=salt, rid=rid)

    def _wait(self, cost: int) -> None:
        """Until the budget has so much, and nothing is in flight."""
        while (left := self._free_at - self._clock()) > 0:
            self._sleep(left)
        while not self._room():
            self._sleep(0.2)
        self._free_at = max(self._free_at, self._clock()) + cost / self._rate
        self.computed += cost


def idle(client: Client) -> bool:
    """Whether a recorded server has no request in flight; false where it does not say."""
    try:
        told = client.call("/probe/status", None)
    except RefusedError:
        return False
    return isinstance(told, dict) and told.get("requests_in_flight") == 0
