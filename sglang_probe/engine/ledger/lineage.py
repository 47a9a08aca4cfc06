"""Reuse lineage: which request computed the KV entry that another one attends to.

A KV slot is not an identity. After every chunk, prefill and finish SGLang inserts the request's entries into the radix
tree; where the tree already holds the same prefix, the request's own entries are freed and its row is repointed to the
tree's (`UnifiedRadixCache.checkpoint_into_tree`). So the owner of a position can change while a request runs.

This module follows the owners without reading the device, in a shadow of the tree: a map from the hash of a prefix, up
to the end of a page, to the owners of that page's positions. An entry is written when the tree takes new entries and
read when a request is matched or repointed. Entries of evicted nodes need no care: SGLang never matches them again
before they are inserted anew, and that overwrites them.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_probe.errors import LedgerError

Codes = np.ndarray[Any, np.dtype[np.int64]]
Hashes = np.ndarray[Any, np.dtype[np.uint64]]

BEFORE = -1
"""Owner of an entry that was computed before the recording began, or so long ago that it was forgotten."""

_ATTEMPT_BITS = 12


@dataclass(frozen=True, slots=True)
class Origin:
    """Positions `[start, end)` were computed by `attempt` of request `rid`, at the same positions there.

    `rid` is None for entries of unknown owner (`BEFORE`).
    """

    start: int
    end: int
    rid: str | None
    attempt: int


class Lineage:
    """Owners of the KV entries of all running requests.

    Args:
        page_size: SGLang's page size: entries are matched and published in whole pages.
        capacity: pages to remember in each of two generations.
    """

    def __init__(self, page_size: int, capacity: int) -> None:
        self._page = page_size
        self._capacity = capacity
        self._young: dict[int, Any] = {}
        self._old: dict[int, Any] = {}
        self._names = _Names()
        self._running: dict[str, _Owners] = {}

    def launch(self, rid: str, attempt: int, start: int, end: int, tokens: Any, namespace: object) -> list[Origin]:
        """A prefill is about to compute `[start, end)`. Returns the origins of what it reuses below `start`.

        Decode steps need not be told: a position above the last prefill is the request's own.

        Args:
            tokens: the request's token ids up to `start` at least, any buffer of int64.
            namespace: what else separates prefixes, e.g. `(extra_key, cache_salt)`.
        """
        own = self._running.get(rid)
        if own is None or own.attempt != attempt:
            number = own.number if own is not None else self._names.new(rid)
            published = own is not None and own.published
            own = self._running[rid] = _Owners(number, attempt, published)
        known = own.length
        origins: list[Origin] = []
        if start > known:
            codes = self._owners_of(_token_array(tokens, start), namespace, known, start)
            own.extend(codes)
            origins = list(self._origins(codes, known))
        own.fill(end)
        return origins

    def adopt(self, rid: str, attempt: int, length: int) -> None:
        """A request that began before the recording holds `length` positions, of owners that nobody knows."""
        own = self._running[rid] = _Owners(self._names.new(rid), attempt, False)
        own.extend(np.full(length, BEFORE, dtype=np.int64))

    def publish(
        self,
        rid: str,
        tokens: Any,
        length: int,
        first_new: int,
        protected: int,
        namespace: object,
        taken: Sequence[tuple[int, int]] = (),
    ) -> list[Origin]:
        """The tree took `rid`'s entries `[first_new, length)` and repointed `[protected, first_new)` to its own.

        Args:
            taken: ranges below `first_new`, in order, of which the tree took `rid`'s entries in the place of those it
                had. Whole pages.

        Returns the origins of the positions whose owner changed.
        """
        own = self._running.get(rid)
        if own is None:  # of nobody whom the recording follows: whoever reuses it must not be told another owner
            hashes = self._page_hashes(_token_array(tokens, length), namespace)
            unknown = BEFORE if self._page == 1 else np.full(self._page, BEFORE, dtype=np.int64)
            for start, end in (*taken, (first_new, length)):
                keys = hashes[start // self._page : end // self._page].tolist()
                self._remember(keys, [unknown] * len(keys))
            return []
        own.fill(length)  # decode steps are not launched one by one: what is not known otherwise is the request's own
        ids = _token_array(tokens, length)
        rebound: list[Origin] = []
        for start, end in _between(taken, protected, first_new):
            before = own.codes[start:end].copy()
            after = self._owners_of(ids, namespace, start, end)
            own.codes[start:end] = after
            changed = np.flatnonzero(before != after)
            for run in np.split(changed, np.flatnonzero(np.diff(changed) > 1) + 1):
                if len(run):
                    rebound += self._origins(after[run[0] : run[-1] + 1], start + int(run[0]))
        for start, end in (*taken, (first_new, length)):
            first_page, pages = start // self._page, end // self._page
            if pages > first_page:
                keys = self._page_hashes(ids, namespace)[first_page:pages]
                codes = own.codes[first_page * self._page : pages * self._page]
                self._names.keep(codes)
                own.published = True
                self._remember(
                    keys.tolist(), codes.tolist() if self._page == 1 else list(codes.reshape(-1, self._page).copy())
                )
        return rebound

    def owners(self, rid: str) -> list[Origin]:
        """Origins of every position that a running request holds: for tests against the true slots."""
        own = self._running.get(rid)
        return [] if own is None else list(self._origins(own.codes[: own.length], 0))

    def end(self, rid: str) -> None:
        """The request is gone; what it published stays."""
        own = self._running.pop(rid, None)
        if own is not None and not own.published:
            self._names.forget(own.number)

    def remembers(self, rid: str) -> bool:
        """Whether anything may still be said to be of this request."""
        return self._names.holds(rid)

    def forget_tree(self) -> None:
        """The tree was flushed."""
        self._young.clear()
        self._old.clear()

    def _owners_of(self, ids: Any, namespace: object, start: int, end: int) -> Codes:
        """Owners of the positions `[start, end)` of a prefix that the tree holds."""
        first, last = start // self._page, -(-end // self._page)
        keys = self._page_hashes(ids[: last * self._page], namespace)[first:last].tolist()
        young, old = self._young, self._old
        missing = BEFORE if self._page == 1 else np.full(self._page, BEFORE, dtype=np.int64)
        found = [young[k] if k in young else old.get(k, missing) for k in keys]
        codes = np.array(found, dtype=np.int64).reshape(-1)
        if old:  # keep what is in use
            self._names.keep(codes)
            self._remember(keys, found)
        offset = start - first * self._page
        codes = codes[offset : offset + end - start]
        if len(codes) != end - start:
            raise LedgerError(f"positions {start} to {end} are reused, but not in whole pages of {self._page}")
        return codes

    def _remember(self, keys: list[int], values: Sequence[Any]) -> None:
        self._young.update(zip(keys, values, strict=True))
        if len(self._young) > self._capacity:
            self._old, self._young = self._young, {}
            self._names.age(own.number for own in self._running.values())

    def _page_hashes(self, ids: Any, namespace: object) -> Hashes:
        """Hash of the prefix up to each page's end, `[len(ids) // page]`.

        A running sum of position-keyed random words (splitmix64 of token and position), modulo 2**64.
        """
        usable = len(ids) // self._page * self._page
        with np.errstate(over="ignore"):
            position = np.arange(1, usable + 1, dtype=np.uint64)
            words = _mix(ids[:usable].astype(np.uint64) + position * np.uint64(0x9E3779B97F4A7C15))
            sums = np.cumsum(words, dtype=np.uint64) + np.uint64(_seed(namespace))
        return sums[self._page - 1 :: self._page]

    def _origins(self, codes: Codes, start: int) -> Iterator[Origin]:
        cuts = np.flatnonzero(np.diff(codes)) + 1
        for a, b in itertools.pairwise([0, *cuts.tolist(), len(codes)]):
            if b > a:
                code = int(codes[a])
                name = None if code == BEFORE else self._names.get(code >> _ATTEMPT_BITS)
                attempt = -1 if name is None else code & ((1 << _ATTEMPT_BITS) - 1)
                yield Origin(start + a, start + b, name, attempt)


class _Names:
    """Request ids by number, for as long as an entry of theirs is remembered: two generations, like the map itself.

    Otherwise a server would keep the name of every request it ever served.
    """

    def __init__(self) -> None:
        self._young: dict[int, str] = {}
        self._old: dict[int, str] = {}
        self._held: set[str] = set()
        self._next = 0

    def new(self, rid: str) -> int:
        number, self._next = self._next, self._next + 1
        self._young[number] = rid
        self._held.add(rid)
        return number

    def holds(self, rid: str) -> bool:
        return rid in self._held

    def get(self, number: int) -> str | None:
        return self._young.get(number) or self._old.get(number)

    def forget(self, number: int) -> None:
        """Nothing that this request computed was published."""
        self._held.discard(self.get(number) or "")
        self._young.pop(number, None)
        self._old.pop(number, None)

    def keep(self, codes: Codes) -> None:
        """Entries of these owners are being remembered anew."""
        if not self._old:
            return
        changes = codes[np.flatnonzero(np.diff(codes, prepend=codes[:1] - 1))]
        for code in changes.tolist():
            number = code >> _ATTEMPT_BITS
            if number in self._old and number not in self._young:
                self._young[number] = self._old[number]

    def age(self, running: Iterable[int]) -> None:
        """A generation is over; names of running requests are kept in any case."""
        names = {number: self.get(number) for number in running}
        gone = self._old
        self._old = self._young
        self._young = {number: name for number, name in names.items() if name is not None}
        for number, name in gone.items():
            if number not in self._old and number not in self._young:
                self._held.discard(name)


class _Owners:
    """Owner codes of one running request's positions, in a growing array."""

    __slots__ = ("attempt", "codes", "length", "number", "published")

    def __init__(self, number: int, attempt: int, published: bool) -> None:
        self.published = published
        self.number = number
        self.attempt = attempt
        self.codes: Codes = np.empty(256, dtype=np.int64)
        self.length = 0

    def extend(self, codes: Codes) -> None:
        start = self.length
        self._grow(start + len(codes))
        self.codes[start : self.length] = codes

    def fill(self, end: int) -> None:
        """The request computed everything up to `end` that is not accounted for yet."""
        start = self.length
        if end > start:
            self._grow(end)
            self.codes[start:end] = self.number << _ATTEMPT_BITS | self.attempt

    def _grow(self, length: int) -> None:
        if length > len(self.codes):
            grown = np.empty(max(length, 2 * len(self.codes)), dtype=np.int64)
            grown[: self.length] = self.codes[: self.length]
            self.codes = grown
        self.length = length


def _between(taken: Sequence[tuple[int, int]], start: int, end: int) -> Iterator[tuple[int, int]]:
    """What of `[start, end)` lies in none of these ranges, which are in order."""
    for first, last in taken:
        if first > start:
            yield start, min(first, end)
        start = max(start, last)
    if end > start:
        yield start, end


def _token_array(tokens: Any, length: int) -> Any:
    """The first `length` token ids without copying, where the buffer allows it."""
    return np.asarray(tokens, dtype=np.int64)[:length]


def _mix(x: Hashes) -> Hashes:
    """The finaliser of splitmix64 (Steele et al. 2014), element by element."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _seed(namespace: object) -> int:
    """Of the namespaces that clients choose only short ones are kept in memory."""
    told = repr(namespace)
    return _seed_of(told) if len(told) < 256 else _seed_of.__wrapped__(told)


@functools.lru_cache(maxsize=4096)
def _seed_of(told: str) -> int:
    return int.from_bytes(hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
