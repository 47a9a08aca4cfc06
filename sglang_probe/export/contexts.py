"""Texts of a run cut into contexts of one length, as tools that think in batches of sequences want them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_probe.errors import ConfigError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Contexts:
    """Which places of texts that lie end to end make up each context, `[C, length]`, and what was left out."""

    places: Array
    repeated: int
    """Contexts none of whose rows is their own: all of it was gathered from another text, whose context is there."""
    rest: int
    """Places that fill no context, or have no row."""


def cut(text: Array, has: Array, own: Array, length: int) -> Contexts:
    """Cut texts into consecutive contexts in which every place has a row.

    Args:
        text: number of the text of each place, ascending.
        has: whether a place has a row, its own or a gathered one.
        own: whether it is its own.

    Without contexts, `places` is `[0, length]`.
    """
    if not len(text):
        return Contexts(np.zeros((0, length), np.int64), 0, 0)
    breaks = np.flatnonzero((np.diff(text) != 0) | (has[1:] != has[:-1])) + 1
    starts = np.concatenate([[0], breaks])
    ends = np.concatenate([breaks, [len(text)]])
    firsts = [
        np.arange(a, b - length + 1, length) for a, b in zip(starts, ends, strict=True) if has[a] and b - a >= length
    ]
    places = np.concatenate([np.zeros(0, np.int64), *firsts])[:, None] + np.arange(length)
    fresh = own[places].any(1)
    kept = places[fresh]
    return Contexts(kept, int((~fresh).sum()), int(len(text) - places.size))


def require_contexts(count: int, length: int) -> None:
    """Refuse to go on without any.

    Raises:
        ConfigError: there are none.
    """
    if not count:
        raise ConfigError(f"no text has {length} consecutive rows", fix="give a smaller --context")
