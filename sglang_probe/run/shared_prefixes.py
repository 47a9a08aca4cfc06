"""What requests have in common, and when the radix tree had it: `sglang_probe.run.causes` is told from here.

Sequences are compared as hashes of their prefixes, all requests of one data-parallel rank at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sglang_probe.hashing import GOLDEN, mix64
from sglang_probe.run import schema

Array = np.ndarray[Any, Any]

WINDOW = 16
"""Tokens in a row that an earlier request must hold, anywhere, for a text to count as computed before."""


def prefix_hashes(ids: Array, offsets: Array, lengths: Array) -> Array:
    """A hash of every prefix of sequences that lie end to end, uint64 `[len(ids)]`: sums of `mix64` words of token and
    position (`sglang_probe.hashing`)."""
    inside = np.arange(len(ids)) - np.repeat(offsets, lengths)
    with np.errstate(over="ignore"):
        words = mix64(ids.astype(np.uint64) + (inside.astype(np.uint64) + np.uint64(1)) * GOLDEN)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(words, dtype=np.uint64)])
        return np.asarray(sums[1:] - np.repeat(sums[offsets], lengths))


class Match(NamedTuple):
    """A request's prefix was asked of the tree: when, how much was given and could be given (NaN: not known)."""

    order: int
    end: int
    limit: float
    limited_by: str | None
    sliding: bool
    """Given only as far as the entries of sliding layers, which have a pool of their own, were there too."""


@dataclass(frozen=True, slots=True)
class _Times:
    """When the tree had a prefix: all moments; and of each request that has it, in the order in which they asked, the
    last one (-1: none), and the latest of these so far."""

    orders: Array
    last: Array
    latest: Array


class SharedPrefixes:
    """What one rank's requests have in common, and when. Times are the orders of `schema.TREE`, of which each recording
    (`opened`) is 2**40 later than the one before."""

    def __init__(
        self, names: pd.Index, ids: Array | None, hashes: Array, offsets: Array, lengths: Array, tree: pd.DataFrame
    ) -> None:
        # Orders begin again with each recording (`opened`), and the tree is empty then; and so do orders here.
        epoch = (tree["event"] == schema.OPENED).cumsum().to_numpy(np.int64)
        # A match is written with its forward, which may be after events that came later.
        tree = tree.assign(order=tree["order"] + (epoch << 40)).sort_values("order", kind="stable")
        self.ids, self.names, self.lengths = ids, names, lengths
        self._hashes, self._offsets = hashes, offsets
        matched = tree[(tree["event"] == schema.MATCHED)]
        matched = matched.assign(sliding=matched["sliding"].eq(True))
        columns = ("rid", "attempt", "order", "end", "limit", "limited_by", "sliding")
        told = zip(*(matched[c].tolist() for c in columns), strict=True)
        self.matches = {(str(rid), int(attempt)): Match(*rest) for rid, attempt, *rest in told}
        self.row_of = {str(name): i for i, name in enumerate(names)}
        first = matched.drop_duplicates("rid")
        self._n = len(names)
        self.asked = np.full(self._n, _NEVER, dtype=np.int64)
        self.space = np.zeros(self._n, dtype=np.uint64)
        at = names.get_indexer(first["rid"])
        self.asked[at[at >= 0]] = first["order"].to_numpy(np.int64)[at >= 0]
        spaces = first["namespace"].map(_seed).to_numpy(np.uint64)
        self.space[at[at >= 0]] = spaces[at >= 0]
        owner = np.repeat(np.arange(self._n), lengths)
        with np.errstate(over="ignore"):
            own = hashes ^ mix64(self.space + GOLDEN)[owner]
        self._group, groups = _grouped(own)
        # In order of time within each group: who has this prefix.
        sort = np.lexsort((self.asked[owner], self._group))
        self._members, self._first = owner[sort], np.searchsorted(self._group[sort], np.arange(groups + 1))
        self._members_asked = self.asked[self._members]
        self._seen = np.full(groups, _NEVER, dtype=np.int64)
        np.minimum.at(self._seen, self._group, self.asked[owner])
        self._any, every = _grouped(hashes)
        self._seen_any = np.full(every, _NEVER, dtype=np.int64)
        np.minimum.at(self._seen_any, self._any, self.asked[owner])
        self._hold(tree, groups)
        emptied = tree["event"].isin([schema.FLUSHED, schema.OPENED])
        self._emptied = tree.loc[emptied, "order"].to_numpy(np.int64)
        evicted = tree[tree["event"] == schema.EVICTED]
        self._evictions = evicted["order"].to_numpy(np.int64)
        self._evicted = np.concatenate([[0], np.cumsum(evicted["tokens"].to_numpy(np.int64))])
        self._times: dict[int, _Times] = {}
        self._text = None if ids is None else self._windows(ids, owner)

    def _hold(self, tree: pd.DataFrame, groups: int) -> None:
        """When the tree first had each prefix; and of each request, when it is known to have had how much."""
        held = tree[tree["event"].isin([schema.PUBLISHED, schema.MATCHED]) & tree["rid"].notna()]
        at = self.names.get_indexer(held["rid"])
        held, at = held[at >= 0], at[at >= 0]
        self._had = np.full(groups, _NEVER, dtype=np.int64)
        ends = np.minimum(held["end"].to_numpy(np.int64), self.lengths[at])
        # What is not new to the tree was published by somebody else, or before the recording.
        told = ~held["rid"].duplicated().to_numpy() | (held["event"] == schema.MATCHED).to_numpy()
        starts = np.where(told, 0, np.minimum(held["start"].to_numpy(np.int64), ends))
        orders = held["order"].to_numpy(np.int64)
        for i, start, end, order in zip(at.tolist(), starts.tolist(), ends.tolist(), orders.tolist(), strict=True):
            where = self._group[self._offsets[i] + start : self._offsets[i] + end]
            self._had[where] = np.minimum(self._had[where], order)
        self._orders, self._ends = orders, ends
        self._events = np.argsort(at, kind="stable")
        self._events_first = np.searchsorted(at[self._events], np.arange(self._n + 1))

    def _windows(self, ids: Array, owner: Array) -> Array:
        """When the `WINDOW` tokens from each position on were first asked by anybody; `_NEVER` at the end."""
        out = np.full(len(ids), _NEVER, dtype=np.int64)
        if len(ids) < WINDOW:
            return out
        with np.errstate(over="ignore"):
            words = np.zeros(len(ids) - WINDOW + 1, dtype=np.uint64)
            for k in range(WINDOW):
                words = mix64(words + ids[k : k + len(words)].astype(np.uint64) + GOLDEN)
        whole = owner[: len(words)] == owner[WINDOW - 1 :]
        group, n = _grouped(words[whole])
        first = np.full(n, _NEVER, dtype=np.int64)
        np.minimum.at(first, group, self.asked[owner[: len(words)][whole]])
        out[: len(words)][whole] = first[group]
        return out

    def slice_of(self, i: int, n: int) -> slice:
        """Of the first `n` positions of a request."""
        return slice(self._offsets[i], self._offsets[i] + n)

    def seen(self, i: int, n: int, before: int) -> int:
        """The longest prefix of request `i` that an earlier one of its namespace has, up to `n`."""
        return _leading(self._seen[self._group[self.slice_of(i, n)]] < before)

    def seen_anywhere(self, i: int, n: int, before: int) -> int:
        """The same in any namespace."""
        return _leading(self._seen_any[self._any[self.slice_of(i, n)]] < before)

    def held(self, i: int, n: int, before: int) -> int:
        """The longest prefix that the tree is known to have had at some earlier moment."""
        return _leading(self._had[self._group[self.slice_of(i, n)]] < before)

    def _sharing(self, i: int, position: int) -> slice:
        """Where the requests stand that have the same prefix up to and with `position`, in the order in which they
        asked."""
        group = self._group[self._offsets[i] + position]
        return slice(self._first[group], self._first[group + 1])

    def _when(self, i: int, position: int) -> _Times:
        """When the tree had the prefix up to and with `position`. Found once for each prefix: all that are ever asked
        come to no more than the run has tokens."""
        group = int(self._group[self._offsets[i] + position])
        if (found := self._times.get(group)) is None:
            members = self._members[self._sharing(i, position)]
            begins, counts = self._events_first[members], self._events_first[members + 1] - self._events_first[members]
            which = np.repeat(np.arange(len(members)), counts)
            inside = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
            events = self._events[np.repeat(begins, counts) + inside]
            had = self._ends[events] > position
            orders = self._orders[events[had]]
            last = np.full(len(members), -1, dtype=np.int64)
            np.maximum.at(last, which[had], orders)
            found = self._times[group] = _Times(np.sort(orders), last, np.maximum.accumulate(last))
        return found

    def last_had(self, i: int, position: int, before: int) -> int:
        """The last event before `before` at which the tree had the prefix up to and with `position`; -1: none."""
        orders = self._when(i, position).orders
        at = int(np.searchsorted(orders, before)) - 1
        return int(orders[at]) if at >= 0 else -1

    def published_after(self, i: int, position: int, after: int) -> bool:
        """Whether the tree gets the prefix up to and with `position` later, from a request that had asked before."""
        where, when = self._sharing(i, position), self._when(i, position)
        earlier = int(np.searchsorted(self._members_asked[where], after))
        if earlier == 0 or when.latest[earlier - 1] <= after:
            return False
        if self.asked[i] >= after:
            return True
        return bool(((when.last[:earlier] > after) & (self._members[where][:earlier] != i)).any())

    def length_at(self, order: int) -> int:
        """Positions of its request that the tree had at an event (`last_had`)."""
        return int(self._ends[np.searchsorted(self._orders, order)])

    def nearest(self, i: int, common: int, before: int) -> int:
        """The latest earlier request with `common` tokens in common; -1: none."""
        if common == 0:
            return -1
        where = self._sharing(i, common - 1)
        at = int(np.searchsorted(self._members_asked[where], before)) - 1
        return int(self._members[where.start + at]) if at >= 0 else -1

    def lost(self, since: int, until: int) -> tuple[int, bool]:
        """Entries that were evicted between two events, before the tree was emptied if it was; and whether it was."""
        at = int(np.searchsorted(self._emptied, since, side="right"))
        emptied = at < len(self._emptied) and self._emptied[at] < until
        end = self._emptied[at] if emptied else until
        first, last = np.searchsorted(self._evictions, since, side="right"), np.searchsorted(self._evictions, end)
        return int(self._evicted[last] - self._evicted[first]), bool(emptied)

    def text_before(self, i: int, start: int, end: int, before: int) -> Array:
        """Which positions `[start, end)` lie in `WINDOW` tokens, all of them from `start` on, that an earlier request
        holds; bool."""
        assert self._text is not None
        hit = self._text[self._offsets[i] + start : self._offsets[i] + max(end - WINDOW + 1, start)] < before
        covered = np.zeros(end - start + 1, dtype=np.int64)
        begins = np.flatnonzero(hit)
        np.add.at(covered, begins, 1)
        np.add.at(covered, begins + WINDOW, -1)
        return np.asarray(np.cumsum(covered)[:-1] > 0)


_NEVER = np.iinfo(np.int64).max


def _seed(namespace: Any) -> int:
    return int(namespace, 16) if isinstance(namespace, str) else 0


def _grouped(hashes: Array) -> tuple[Array, int]:
    """Number of the group of equal hashes of each entry, and how many groups there are."""
    unique, group = np.unique(hashes, return_inverse=True)
    return group.astype(np.int64), len(unique)


def _leading(true: Array) -> int:
    """How many entries come before the first false one."""
    return int(len(true) if true.all() else np.argmin(true))
