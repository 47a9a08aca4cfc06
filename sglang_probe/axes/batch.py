"""What an axis sees: consecutive requests, their positions laid end to end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SEGMENT = "segment"
"""Name under which a batch holds the workload's segments among its intervals."""


@dataclass(frozen=True)
class Painted:
    """Disjoint ranges of a batch's positions, `[start[i], end[i])`, each with a class number; sorted by start."""

    start: Array
    end: Array
    code: Array


_NONE = Painted(*np.zeros((3, 0), dtype=np.int64))


@dataclass(frozen=True)
class Batch:
    """N positions of n consecutive requests.

    The positions of request i are `[offsets[i], offsets[i + 1])` of all arrays of length N.
    """

    offsets: Array
    """int64 [n + 1]"""
    begin: Array
    """int32 [n]: position of each request's first entry here; 0 but in segments of a live recording."""
    prompt_len: Array
    """int32 [n]; -1 unknown."""
    span_length: Array
    """int64 [s]: the spans that the positions lie in, laid end to end; their lengths sum to N."""
    span_phase: Array
    """uint8 [s]: number in `run.columns.PHASES`, or their count where the ledger names no phase."""
    token_id: Array | None = None
    """int32 [N], -1 where unknown; None where no axis asked for it."""
    painted: Mapping[str, Painted] = field(default_factory=dict)
    """Segments and the axes that the workload labelled itself."""

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def position(self) -> Array:
        """int32 [N]: position in the request."""
        return np.arange(len(self), dtype=np.int32) - self.each((self.offsets[:-1] - self.begin).astype(np.int32))

    @cached_property
    def depth(self) -> Array:
        """int32 [N]: number of the generated token, from 0; negative in the prompt. Wrong without `prompt_len`."""
        return self.position - self.each(self.prompt_len)

    @cached_property
    def phase(self) -> Array:
        """uint8 [N]: as `span_phase`, for each position."""
        return np.repeat(self.span_phase, self.span_length)

    @property
    def ids(self) -> Array:
        """int32 [N]: token ids of an axis that declared that it needs them."""
        assert self.token_id is not None, "the axis does not say `needs_ids`"
        return self.token_id

    def each(self, values: Array) -> Array:
        """One value per request, `[n]`, as one per position, `[N]`."""
        return np.repeat(values, np.diff(self.offsets))

    def paint(self, name: str, default: int) -> Array:
        """uint16 [N]: class numbers of the named intervals, `default` in the gaps."""
        p = self.painted.get(name, _NONE)
        codes = np.full(2 * len(p.start) + 1, default, dtype=np.uint16)
        codes[1::2] = p.code
        edges = np.empty(2 * len(p.start) + 2, dtype=np.int64)
        edges[0], edges[-1], edges[1:-1:2], edges[2:-1:2] = 0, len(self), p.start, p.end
        return np.repeat(codes, np.diff(edges))
