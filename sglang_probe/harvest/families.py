"""Prefix families: requests that one engine's radix tree would hold below one branch, found before anything is served.

Several engines have several caches. A request reuses what an earlier one computed only where both run on one engine, so
requests that begin alike are kept together: with whole families, what is computed and what is reused is what one engine
would give. A family that is more than an engine's fair share of the work is cut where its prompts part, and then each
engine that serves a piece computes the beginning of that family once for itself (`Cut`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from sglang_probe.ask import Ask
from sglang_probe.harvest.in_flight import Asked, Turn
from sglang_probe.harvest.pool import shared_length
from sglang_probe.workload.build import new_tokens
from sglang_probe.workload.request import asked_rid

Order = Literal["as_given", "families"]
"""How the requests of a recording are sent: in their order, or so that what they share is computed once."""

WORTH_WAITING_FOR = 32
"""Tokens that requests share, at least, for one to wait for the other. SGLang's own scheduler lets a request wait for
another of its queue from as many on (`IN_BATCH_PREFIX_CACHING_DEPRIORITIZE_THRESHOLD`), if its policy is `lpm`; but it
knows those alone that are in flight, and takes both into one batch where there is room."""


@dataclass(frozen=True)
class Family:
    """Requests that are served by one engine. `tokens`: of their prompts, and those that they may generate."""

    requests: tuple[Asked, ...]
    tokens: int

    @staticmethod
    def of(requests: Sequence[Asked]) -> Family:
        """These requests as one."""
        return Family(tuple(requests), sum(map(_weight, requests)))


@dataclass(frozen=True)
class Cut:
    """A family that was too large for one engine. Its prompts share `positions` tokens, in whole pages: where its
    `pieces` are served by n engines, these positions are computed n times and not once."""

    positions: int
    pieces: int


def families_of(requests: Sequence[Asked], *, page_size: int, engines: int) -> tuple[list[Family], list[Cut]]:
    """Requests by what they share, in whole pages as the radix tree shares them.

    Args:
        requests: in the order in which they are to be served, which each family keeps; families come in the order of
            their first requests.
        engines: how many there are. A family of more tokens than the n-th part of all is cut, as often as that takes.
    """
    ids = [tuple(prompt) for _, prompt, _ in requests]
    order = sorted(range(len(requests)), key=ids.__getitem__)
    prompts = [ids[i] for i in order]
    pages = [shared_length(a, b) // page_size for a, b in pairwise(prompts)]
    shared = np.array(pages, dtype=np.int64)  # shared[i]: pages that prompts i and i + 1 have in common
    weights = np.array([_weight(r) for r in requests], dtype=np.int64)
    ends = np.concatenate([[0], np.cumsum(weights[order])])
    share = int(ends[-1]) / max(engines, 1)

    found: list[list[int]] = []
    cuts: list[Cut] = []
    todo = [(a, b) for a, b in _parted(shared, 0, len(order), 0)]
    while todo:
        a, b = todo.pop()
        if ends[b] - ends[a] <= share or b - a == 1:
            found.append(sorted(order[a:b]))
            continue
        depth = int(shared[a : b - 1].min())
        pieces = _parted(shared, a, b, depth)
        cuts.append(Cut(depth * page_size, len(pieces)))
        todo += pieces
    found.sort()
    families = [Family.of([requests[i] for i in one]) for one in found]
    return families, sorted(cuts, key=lambda c: (c.positions, c.pieces))


def turns_of(requests: Sequence[Asked], families: Sequence[Family], concurrency: int) -> dict[str, Turn]:
    """By a request's own id: when an engine that serves several of these families sends it.

    One engine that has all of them sends the n-th request when fewer than `concurrency` of those before it are left, so
    that of its family those that are `concurrency` or more before it in the workload are, as a rule, answered and in
    the cache. An engine that has a part of the families would come to it sooner: it waits for the last of those.

    Args:
        requests: of all families, in workload order.
        concurrency: requests in flight at once in the one engine, and in each.
    """
    numbers = {asked_rid(rid): i for i, (rid, _, _) in enumerate(requests)}
    turns = {}
    for family in families:
        names = [asked_rid(rid) for rid, _, _ in family.requests]
        last = -1  # the last sibling that is far enough before
        for name in names:
            while last + 1 < len(names) and numbers[names[last + 1]] <= numbers[name] - concurrency:
                last += 1
            turns[name] = Turn(numbers[name], names[last] if last >= 0 else None)
    return turns


def turns_by_families(requests: Sequence[Asked], *, page_size: int) -> dict[str, Turn]:
    """By a request's own id: not before the prompt was computed of the first one that begins with all that it shares
    with any earlier one. Whatever can be sent is sent in the given order, so that a cache that is smaller than the
    workload holds what is needed next.

    A request that says itself how it uses the cache, or rotates positions of its own, waits for nobody and is waited
    for by nobody. Those that are steered alike share with each other.

    Args:
        requests: in the order in which they are to be served.
        page_size: tokens are shared in whole pages.
    """
    turns = {asked_rid(rid): Turn(i) for i, (rid, _, _) in enumerate(requests)}
    spaces: dict[str, list[int]] = {}
    for i, (_, _, sampling) in enumerate(requests):
        ask = Ask.of(sampling)
        if ask.cache is None and ask.positions is None:
            spaces.setdefault(repr(ask.steer), []).append(i)
    for numbers in spaces.values():
        owners = _owners([tuple(requests[i][1]) for i in numbers], page_size)
        for i, owner in zip(numbers, owners, strict=True):
            if owner is not None:
                after = asked_rid(requests[numbers[owner]][0])
                turns[asked_rid(requests[i][0])] = Turn(i, after, begun=True)
    return turns


def _owners(prompts: Sequence[tuple[int, ...]], page_size: int) -> list[int | None]:
    """Of each prompt, the first one that begins with all that it shares with any before it; None: that is too little.

    In sorted order, the nearest earlier prompt to the left or to the right shares most with it. Prompts are taken out
    of that order from the last one on, so that all that are left are earlier ones.
    """
    n = len(prompts)
    order = sorted(range(n), key=prompts.__getitem__)
    left, right = [-1] * n, [-1] * n
    with_right = [0] * n  # tokens that a prompt shares with the one to its right
    for a, b in pairwise(order):
        left[b], right[a] = a, b
        with_right[a] = shared_length(prompts[a], prompts[b]) // page_size * page_size
    nearest: list[tuple[int, int]] = [(0, -1)] * n
    for i in reversed(range(n)):
        a, b = left[i], right[i]
        to_left, to_right = with_right[a] if a >= 0 else 0, with_right[i]
        nearest[i] = (to_left, a) if to_left >= to_right else (to_right, b)
        if a >= 0:
            right[a], with_right[a] = b, min(to_left, to_right)
        if b >= 0:
            left[b] = a
    owners: list[int | None] = []
    for shared, owner in nearest:
        while owner >= 0 and nearest[owner][0] >= shared > 0:  # all that is shared was another one's before
            owner = nearest[owner][1]
        owners.append(owner if shared >= WORTH_WAITING_FOR else None)
    return owners


def ready(requests: Collection[str], turns: Mapping[str, Turn]) -> list[str]:
    """Those of the requests that wait for no other of them, in the order of their turns; rids.

    Args:
        turns: those that have none wait for nobody.
    """
    names = set(map(asked_rid, requests))
    turn = {rid: turns.get(asked_rid(rid), Turn(0)) for rid in requests}
    return sorted((rid for rid in requests if turn[rid].after not in names), key=lambda rid: turn[rid].number)


def perhaps_in_flight(requests: Collection[str], turns: Mapping[str, Turn], concurrency: int) -> list[str]:
    """Of what an engine that is lost had not answered, what it may have been serving; rids.

    Besides those that wait for no other, the first `concurrency` of those for which a first token is enough: it may
    have come, and that it did nobody can say any more.
    """
    alone = ready(requests, turns)
    sent, begun = set(map(asked_rid, alone)), []
    for rid in sorted(requests, key=lambda rid: turns.get(asked_rid(rid), Turn(0)).number):
        turn = turns.get(asked_rid(rid), Turn(0))
        if turn.begun and turn.after in sent and asked_rid(rid) not in sent:
            sent.add(asked_rid(rid))
            begun.append(rid)
    return alone + begun[:concurrency]


def _weight(request: Asked) -> int:
    _, prompt, sampling = request
    return len(prompt) + new_tokens(sampling)


def _parted(shared: np.ndarray[tuple[int], np.dtype[np.int64]], a: int, b: int, depth: int) -> list[tuple[int, int]]:
    """Prompts `[a, b)`, sorted, in runs that share more than `depth` pages."""
    if a == b:
        return []
    edges = [a, *(a + 1 + np.flatnonzero(shared[a : b - 1] <= depth)).tolist(), b]
    return list(pairwise(edges))


class FamilyQueue:
    """Families that wait, a queue for each engine. An engine whose queue is empty takes the last family of the queue
    that has most left: whole, so that nothing is shared between the two.

    Args:
        families: the largest go first to the queue with least in it; each queue keeps the order in which they are here.
    """

    def __init__(self, families: Sequence[Family], engines: int) -> None:
        load = [0] * engines
        chosen: list[list[int]] = [[] for _ in range(engines)]
        for i in sorted(range(len(families)), key=lambda i: -families[i].tokens):
            least = min(range(engines), key=lambda e: load[e])
            load[least] += families[i].tokens
            chosen[least].append(i)
        self._queues = [deque(families[i] for i in sorted(mine)) for mine in chosen]
        self._tokens = load
        self.stolen = 0
        """Families that were taken from another engine's queue."""

    def take(self, engine: int, *, steal: bool = True) -> Family | None:
        """The next family for an engine; None: none is left.

        Args:
            steal: it may be another engine's.
        """
        if self._queues[engine]:
            family = self._queues[engine].popleft()
        else:
            engine = max(range(len(self._queues)), key=lambda e: (bool(self._queues[e]), self._tokens[e]))
            if not (steal and self._queues[engine]):
                return None
            self.stolen += 1
            family = self._queues[engine].pop()
        self._tokens[engine] -= family.tokens
        return family

    def give_back(self, engine: int, family: Family) -> None:
        """What an engine had taken and did not finish: its next, unless another takes it first."""
        self._queues[engine].appendleft(family)
        self._tokens[engine] += family.tokens

    @property
    def waiting(self) -> bool:
        """Whether any family is left."""
        return any(self._queues)
