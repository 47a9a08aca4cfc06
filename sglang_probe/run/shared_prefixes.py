"""What requests have in common, and when the radix tree had it: `sglang_probe.run.causes` is told from here.

Sequences are compared as hashes of their prefixes, all requests of one data-parallel rank at once.
"""

from __future__ import annotations

from typing import Any

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
        self.matches = {(str(r.rid), int(r.attempt)): r for r in matched.itertuples()}
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
        self._seen = np.full(groups, _NEVER, dtype=np.int64)
        np.minimum.at(self._seen, self._group, self.asked[owner])
        self._any, every = _grouped(hashes)
        self._seen_any = np.full(every, _NEVER, dtype=np.int64)
        np.minimum.at(self._seen_any, self._any, self.asked[owner])
        self._hold(tree, groups)
        lost = tree[tree["event"].isin([schema.FLUSHED, schema.OPENED])]
        self._flushes = lost["order"].to_numpy(np.int64)
        self._text = None if ids is None else self._windows(ids, owner)

    def _hold(self, tree: pd.DataFrame, groups: int) -> None:
        """When the tree first had each prefix; and of each request, when it is known to have had how much."""
        held = tree[tree["event"].isin([schema.PUBLISHED, schema.MATCHED]) & tree["rid"].notna()]
        at = self.names.get_indexer(held["rid"])
        held, at = held[at >= 0], at[at >= 0]
        self._had = np.full(groups, _NEVER, dtype=np.int64)
        self._events: dict[int, tuple[Array, Array]] = {}
        ends = np.minimum(held["end"].to_numpy(np.int64), self.lengths[at])
        # What is not new to the tree was published by somebody else, or before the recording.
        told = ~held["rid"].duplicated().to_numpy() | (held["event"] == schema.MATCHED).to_numpy()
        starts = np.where(told, 0, np.minimum(held["start"].to_numpy(np.int64), ends))
        orders = held["order"].to_numpy(np.int64)
        for i, start, end, order in zip(at.tolist(), starts.tolist(), ends.tolist(), orders.tolist(), strict=True):
            where = self._group[self._offsets[i] + start : self._offsets[i] + end]
            self._had[where] = np.minimum(self._had[where], order)
        for i in np.unique(at).tolist():
            mine = at == i
            self._events[i] = (orders[mine], ends[mine])

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

    def sharing(self, i: int, position: int) -> Array:
        """Requests that have the same prefix up to and with `position`, in the order in which they asked."""
        group = self._group[self._offsets[i] + position]
        return self._members[self._first[group] : self._first[group + 1]]

    def last_had(self, i: int, position: int, before: int) -> int:
        """The last event before `before` at which the tree had the prefix up to and with `position`."""
        last = -1
        for other in self.sharing(i, position).tolist():
            orders, ends = self._events.get(other, _NO_EVENTS)
            good = orders[(ends > position) & (orders < before)]
            last = max(last, int(good[-1])) if len(good) else last
        return last

    def published_after(self, i: int, position: int, after: int) -> bool:
        """Whether the tree gets the prefix up to and with `position` later, from a request that had asked before."""
        for other in self.sharing(i, position).tolist():
            if other == i or self.asked[other] >= after:
                continue
            orders, ends = self._events.get(other, _NO_EVENTS)
            if ((ends > position) & (orders > after)).any():
                return True
        return False

    def nearest(self, i: int, common: int, before: int) -> int:
        """The latest earlier request with `common` tokens in common; -1: none."""
        if common == 0:
            return -1
        members = self.sharing(i, common - 1)
        at = int(np.searchsorted(self.asked[members], before)) - 1
        return int(members[at]) if at >= 0 else -1

    def flushed(self, since: int, until: int) -> bool:
        """Whether the tree was emptied between two events."""
        return bool(((self._flushes > since) & (self._flushes < until)).any())

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
_NO_EVENTS: tuple[Array, Array] = (np.empty(0, np.int64), np.empty(0, np.int64))


def _seed(namespace: Any) -> int:
    return int(namespace, 16) if isinstance(namespace, str) else 0


def _grouped(hashes: Array) -> tuple[Array, int]:
    """Number of the group of equal hashes of each entry, and how many groups there are."""
    unique, group = np.unique(hashes, return_inverse=True)
    return group.astype(np.int64), len(unique)


def _leading(true: Array) -> int:
    """How many entries come before the first false one."""
    return int(len(true) if true.all() else np.argmin(true))
