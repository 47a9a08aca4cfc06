"""Prefix families: requests that one engine's radix tree would hold below one branch, found before anything is served.

Several engines have several caches. A request reuses what an earlier one computed only where both run on one engine, so
requests that begin alike are kept together: with whole families, what is computed and what is reused is what one engine
would give. A family that is more than an engine's fair share of the work is cut where its prompts part, and then each
engine that serves a piece computes the beginning of that family once for itself (`Cut`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sglang_probe.harvest.in_flight import Asked
from sglang_probe.harvest.pool import shared_length
from sglang_probe.workload.build import new_tokens


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
        self.stolen = 0
        """Families that were taken from another engine's queue."""

    def take(self, engine: int) -> Family | None:
        """The next family for an engine; None: none is left."""
        if self._queues[engine]:
            return self._queues[engine].popleft()
        longest = max(self._queues, key=lambda q: (bool(q), sum(f.tokens for f in q)))
        if not longest:
            return None
        self.stolen += 1
        return longest.pop()

    def give_back(self, engine: int, family: Family) -> None:
        """What an engine had taken and did not finish: its next, unless another takes it first."""
        self._queues[engine].appendleft(family)

    @property
    def waiting(self) -> bool:
        """Whether any family is left."""
        return any(self._queues)
