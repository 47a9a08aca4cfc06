"""Which positions of a prompt an answer needs: found by taking them away, and watching the answer.

Facts need not lie where a human looks, and attention does not say what would be missed. So pieces of the prompt are
removed from the cache one at a time; a piece is *needed* if the right answer then loses `least` nats, or is no longer
the most likely one. Needed pieces are halved until single positions are left, or until neither half alone is missed:
then the answer can be read at several places of the piece, and its borders are drawn in as far as they go.

What is written twice, in pieces that are far apart, is not found: the answer stands without either.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

Range = tuple[int, int]
"""Positions `[start, end)`."""
PIECE = 16
"""Longest piece that is removed at first, in positions. Longer ones cost more halvings, and hide that a fact is kept
alive by its neighbours."""
LEAST = 1.0
"""Nats of the answer's log-likelihood that count as needed."""


@dataclass(frozen=True)
class Scored:
    """The right answer under some cache."""

    log_likelihood: float
    """Of all its tokens, in nats, each given the right ones before it."""
    right: bool
    """Whether each of them is the most likely token."""


Score = Callable[[Sequence[frozenset[int]]], list[Scored]]
"""Scores the answer without each of some sets of positions."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a prompt that is taken away as a whole, or in pieces if it is long."""

    name: str
    start: int
    end: int


@dataclass(frozen=True)
class Needed:
    """Positions `[start, end)` that an answer needs; jointly, if there are several: each alone is not missed."""

    segment: str
    """Name of the segment in which they lie."""
    start: int
    end: int
    drop: float
    """Nats that the answer loses without them."""
    breaks: bool
    """Whether the answer was right, and is wrong without them."""
    control_drop: float
    """Nats that it loses without as many other positions, drawn at random."""
    control_breaks: bool


@dataclass(frozen=True)
class Found:
    """What one answer needs."""

    whole: Scored
    """The answer under the whole cache."""
    needed: tuple[Needed, ...]
    """By position."""
    removals: int
    """Sets of positions that were tried."""


def find_needed(
    score: Score, segments: Sequence[Segment], *, piece: int = PIECE, least: float = LEAST, seed: int = 0
) -> Found:
    """Search for the positions that an answer needs.

    Args:
        score: the answer without some positions (`sglang_probe.eviction.removal`).
        segments: what may be removed, disjoint.
        piece: longest stretch that is removed at first.
        least: nats that count.
        seed: of the positions that controls remove.
    """
    search = _Search(score, least)
    pieces = [Segment(s.name, a, b) for s in segments for a, b in _pieces(s, piece)]
    names = {p: s.name for s in segments for p in range(s.start, s.end)}
    ranges = search.narrowed([(s.start, s.end) for s in pieces])
    taken = {p for a, b in ranges for p in range(a, b)}
    others, rng = sorted(names.keys() - taken), random.Random(seed)
    controls = [frozenset(rng.sample(others, min(b - a, len(others)))) for a, b in ranges]
    alone = search.scored([_positions(r) for r in ranges])
    beside = search.scored(controls)
    whole = search.whole
    needed = [
        Needed(
            names[a],
            a,
            b,
            whole.log_likelihood - mine.log_likelihood,
            whole.right and not mine.right,
            whole.log_likelihood - control.log_likelihood,
            whole.right and not control.right,
        )
        for (a, b), mine, control in zip(ranges, alone, beside, strict=True)
    ]
    return Found(whole, tuple(needed), search.tried)


class _Search:
    """Counts and remembers what was tried."""

    def __init__(self, score: Score, least: float) -> None:
        self._score, self._least = score, least
        self._known: dict[frozenset[int], Scored] = {}
        self.whole = self.scored([frozenset()])[0]

    @property
    def tried(self) -> int:
        return len(self._known) - 1

    def scored(self, removed: Sequence[frozenset[int]]) -> list[Scored]:
        new = [r for r in dict.fromkeys(removed) if r not in self._known]
        if new:
            self._known.update(zip(new, self._score(new), strict=True))
        return [self._known[r] for r in removed]

    def needed(self, ranges: Sequence[Range]) -> list[bool]:
        found = self.scored([_positions(r) for r in ranges])
        return [
            self.whole.log_likelihood - s.log_likelihood >= self._least or (self.whole.right and not s.right)
            for s in found
        ]

    def narrowed(self, ranges: Sequence[Range]) -> list[Range]:
        """The needed ones of some ranges, as narrow as they can be made; a level of halvings at a time."""
        level = [r for r, n in zip(ranges, self.needed(ranges), strict=True) if n]
        done: list[Range] = []
        joint: list[Range] = []
        while level:
            done += [(a, b) for a, b in level if b - a == 1]
            halves = [((a, m), (m, b)) for a, b in level if b - a > 1 for m in [(a + b) // 2]]
            verdict = self.needed([h for pair in halves for h in pair])
            level = []
            for i, (left, right) in enumerate(halves):
                kept = [h for h, n in zip((left, right), verdict[2 * i : 2 * i + 2], strict=True) if n]
                level += kept
                if not kept:
                    joint.append((left[0], right[1]))
        return sorted(done + self._drawn_in(joint))

    def _drawn_in(self, ranges: list[Range]) -> list[Range]:
        """Ranges that are needed though neither half is, with both borders as far in as they can be."""
        starts = _furthest([(a, b - 1) for a, b in ranges], lambda xs: self._asked(ranges, xs, left=True))
        ranges = [(s, b) for s, (_, b) in zip(starts, ranges, strict=True)]
        # The end, counted backwards.
        cut = _furthest([(0, b - a - 1) for a, b in ranges], lambda xs: self._asked(ranges, xs, left=False))
        return [(a, b - c) for (a, b), c in zip(ranges, cut, strict=True)]

    def _asked(self, ranges: list[Range], at: list[int | None], *, left: bool) -> list[bool]:
        asked = [(x, b) if left else (a, b - x) for (a, b), x in zip(ranges, at, strict=True) if x is not None]
        verdict = iter(self.needed(asked))
        return [x is not None and next(verdict) for x in at]


def _furthest(bounds: list[Range], holds: Callable[[list[int | None]], list[bool]]) -> list[int]:
    """For each `(low, high)` the highest number that holds, by bisection; `low` holds. All are asked at once."""
    low, high = [a for a, _ in bounds], [b for _, b in bounds]
    while any(a < b for a, b in zip(low, high, strict=True)):
        at = [(a + b + 1) // 2 if a < b else None for a, b in zip(low, high, strict=True)]
        for i, (x, held) in enumerate(zip(at, holds(at), strict=True)):
            if x is not None:
                low[i], high[i] = (x, high[i]) if held else (low[i], x - 1)
    return low


def _pieces(segment: Segment, most: int) -> list[Range]:
    """A segment in the fewest pieces of nearly equal length that are not longer than `most`."""
    length = segment.end - segment.start
    many = -(-length // most)
    edges = [segment.start + round(i * length / many) for i in range(many + 1)] if many else []
    return list(pairwise(edges))


def _positions(r: Range) -> frozenset[int]:
    return frozenset(range(*r))
