"""Unique contexts: tokens together with their whole prefix, each counted once.

Two positions have the same context if their token ids from the beginning of the request up to them are equal: then the
model computes the same for both, up to rounding. `cache_salt` and `extra_key` separate cache entries and not contexts:
they say what SGLang may reuse, not what the model computes. (LoRA, which would, is refused when recording.)

The requests are paths in a trie. A request's path leaves the paths of all earlier requests at one position, `new_from`;
after it every context is seen for the first time. So one integer per request says which positions are first
occurrences, and no set of a hundred million contexts is ever held.

`new_from` is found in two passes. The first compares whole blocks of 32 tokens by a 64-bit hash of the prefix up to the
block's end (`sglang_probe.hashing`: for 1e8 positions, two different prefixes are taken for the same with probability
3e-7). The second compares the block in which a request leaves the others token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_probe.errors import ConfigError
from sglang_probe.hashing import GOLDEN, mix64

Array = np.ndarray[Any, Any]
BLOCK = 32
_ROWS = 1 << 15
"""Rows that are compared with their neighbours at a time."""

Pass = Callable[[], Iterator[tuple[int, Array, Array]]]
"""Gives batches of requests: number of the first, offsets `[n + 1]`, and token ids laid end to end."""


@dataclass(frozen=True)
class Trie:
    """How the requests' paths branch."""

    new_from: Array
    """int64 [R]: positions from here on have contexts that no earlier request has."""
    parent: Array
    """int64 [R]: the earlier request that shares the positions below `new_from`; -1 where there are none."""


def block_hashes(offsets: Array, ids: Array) -> tuple[Array, Array]:
    """Hash of the prefix up to the end of each whole block, and the number of blocks of each request."""
    lengths = np.diff(offsets)
    position = np.arange(1, len(ids) + 1, dtype=np.uint64) - np.repeat(offsets[:-1].astype(np.uint64), lengths)
    position *= GOLDEN
    position += ids.astype(np.uint64)
    sums = np.cumsum(mix64(position), dtype=np.uint64)
    blocks = lengths // BLOCK
    total = int(blocks.sum())
    nth = np.arange(1, total + 1) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    at = np.repeat(offsets[:-1], blocks) + nth * BLOCK - 1
    before = np.concatenate([np.zeros(1, dtype=np.uint64), sums])[offsets[:-1]]
    return sums[at] - np.repeat(before, blocks), blocks


class TrieBuilder:
    """Builds a `Trie` from two passes over the same requests.

    Feed every batch of the first pass to `add`, then call `build` with a way to make the second.
    """

    def __init__(self) -> None:
        self._hashes: list[Array] = []
        self._blocks: list[Array] = []
        self._lengths: list[Array] = []

    def add(self, offsets: Array, ids: Array) -> None:
        """The next requests of the first pass; a request of length 0 takes no part."""
        hashes, blocks = block_hashes(offsets, ids)
        self._hashes.append(hashes)
        self._blocks.append(blocks)
        self._lengths.append(np.diff(offsets))

    def build(self, second_pass: Pass) -> Trie:
        """Compare tokens where requests part."""
        lengths = _joined(self._lengths)
        blocks = _joined(self._blocks)
        hashes = _joined(self._hashes, np.uint64)
        self._hashes, self._blocks, self._lengths = [], [], []
        ends = np.cumsum(blocks)
        first_of = ends - blocks
        creator = _creators(hashes)
        del hashes  # one of a few arrays of a number for every block: they are most of the memory that this takes
        repeats = np.zeros(len(creator) + 1, dtype=np.int32)
        np.cumsum(creator < np.arange(len(creator), dtype=np.int32), out=repeats[1:])
        # Seen blocks come before unseen ones, because a prefix of a seen prefix is seen.
        seen = (repeats[ends] - repeats[first_of]).astype(np.int64)
        del repeats
        parent_block = np.where(seen > 0, creator[np.maximum(first_of + seen - 1, 0)] if len(creator) else 0, -1)
        del creator

        # Rows to compare: the first block of each request that is not seen, and, of the requests that were the first
        # with the block before it, the block after that.
        leaving = np.flatnonzero(lengths > seen * BLOCK)
        shared = np.unique(parent_block[leaving])
        shared = shared[shared >= 0]
        by = np.searchsorted(ends, shared, side="right")  # whose block it is
        request = np.concatenate([leaving, by])
        start = np.concatenate([seen[leaving], shared - first_of[by] + 1]) * BLOCK
        group = np.concatenate([parent_block[leaving], shared])
        keyed = _gather(second_pass, request, start, group)
        length, neighbour = _longest_shared(request, keyed)

        new_from = seen * BLOCK
        parent = np.where(parent_block >= 0, np.searchsorted(ends, parent_block, side="right"), -1)
        mine = slice(0, len(leaving))
        new_from[leaving] += np.maximum(length[mine], 0)
        parent[leaving] = np.where(length[mine] > 0, neighbour[mine], parent[leaving])
        return Trie(new_from, parent)


def _creators(hashes: Array) -> Array:
    """For each block the first one with the same prefix, int32."""
    if len(hashes) >= 1 << 31:
        raise ConfigError(f"{len(hashes):,} blocks of {BLOCK} tokens are too many to be compared at once")
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    opens = np.ones(len(hashes), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=opens[1:])
    del ordered
    first = order[opens].astype(np.int32)
    creator = np.empty(len(hashes), dtype=np.int32)
    creator[order] = np.repeat(first, np.diff(np.append(np.flatnonzero(opens), len(hashes))))
    return creator


def _joined(arrays: list[Array], dtype: Any = np.int64) -> Array:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)


def _gather(second_pass: Pass, request: Array, start: Array, group: Array) -> Array:
    """`[rows, 1 + BLOCK]`: the group of each row plus two, and tokens `[start, start + BLOCK)` of its request plus one,
    0 past the request's end."""
    rows = np.zeros((len(request), 1 + BLOCK), dtype=np.int32)
    rows[:, 0] = group + 2
    order = np.argsort(request, kind="stable")
    ordered, done = request[order], 0
    step = np.arange(BLOCK)
    for low, offsets, ids in second_pass():
        until = int(np.searchsorted(ordered, low + len(offsets) - 1, side="left"))
        chosen = order[done:until]
        done = until
        local = request[chosen] - low
        at = (offsets[local] + start[chosen])[:, None] + step
        inside = at < offsets[local + 1][:, None]
        rows[chosen, 1:] = np.where(inside, ids[np.where(inside, at, 0)] + 1, 0) if len(ids) else 0
    return rows


def _longest_shared(request: Array, keyed: Array) -> tuple[Array, Array]:
    """For each row the longest beginning that it shares with a row of the same group and an earlier request.

    Returns the length (-1: no such row), and the earliest request that shares so much.
    """
    count = len(request)
    best, whom = np.full(count, -1, dtype=np.int64), np.full(count, -1, dtype=np.int64)
    if count < 2:
        return best, whom
    order = np.argsort(keyed.view(f"S{keyed.shape[1] * 4}").ravel())
    shared = np.empty(count - 1, dtype=np.int64)
    for low in range(0, count - 1, _ROWS):  # some at a time: copies of all rows would be most of the memory
        some = keyed[order[low : low + _ROWS + 1]]
        same = (some[1:] == some[:-1]) & (some[1:] > 0)
        shared[low : low + len(same)] = np.where(same.all(axis=1), BLOCK, np.argmin(same, axis=1) - 1)
    # Sorted rows that share at least so much lie side by side. Of each such stretch every row but that of the earliest
    # request shares so much with it.
    requests = request[order]
    length, neighbour = np.full(count, -1, dtype=np.int64), np.full(count, -1, dtype=np.int64)
    for least in range(int(shared.max()), -1, -1):
        begins = np.concatenate([[0], np.flatnonzero(shared < least) + 1])
        earliest = np.minimum.reduceat(requests, begins)
        earliest = np.repeat(earliest, np.diff(begins, append=count))
        found = (length < 0) & (requests > earliest)
        length[found] = least
        neighbour[found] = earliest[found]
    best[order], whom[order] = length, neighbour
    return best, whom
