"""What differs where a request diverges from its nearest one: a changed stretch, another order, or another text."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sglang_probe.run.shared_prefixes import WINDOW

Text = Callable[[Sequence[int]], str]


class Difference(StrEnum):
    """How two prompts differ from the first different token on."""

    TIMESTAMP = "a time or an identifier"
    """A short stretch differs and the text goes on alike; what differs is part of a date, a time, or an identifier."""
    MARKER = "a changed stretch"
    """A short stretch differs, and the text goes on alike."""
    ORDER = "another order"
    """The same pieces come in another order."""
    TEXT = "another text"
    """Longer, or unlike."""


@dataclass(frozen=True)
class Differs:
    """What differs from position `at` on: `theirs` and `ours` are the tokens until the texts go on alike."""

    kind: Difference
    at: int
    theirs: tuple[int, ...] = ()
    ours: tuple[int, ...] = ()


SHORT = 64
"""Tokens that a changed stretch has at most."""
LOOK = 8192
"""Tokens after the divergence that are compared."""
SHOWN = 24
"""Tokens before and after a changed stretch in which a date or an identifier may begin and end."""

_CLOCK = re.compile(
    r"\d{4}-\d{1,2}-\d{1,2}([T ]\d{1,2}:\d{2}(:\d{2})?)?|\d{1,2}[/.]\d{1,2}[/.]\d{2,4}|\d{1,2}:\d{2}(:\d{2})?"
    r"|\b\d{10}(\d{3})?\b|\b[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b|\b[0-9a-f]{16,64}\b"
    r"|\b(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b|\b(January|February|March|April|May|June|July|August|September"
    r"|October|November|December)\b"
)


def compare(ours: Sequence[int], theirs: Sequence[int], at: int, text: Text | None) -> Differs:
    """How `ours` differs from `theirs`, which have the first `at` tokens in common.

    Args:
        text: of token ids; None: there is no tokenizer, and a time is not told from another changed stretch.
    """
    a, b = tuple(ours[at : at + LOOK]), tuple(theirs[at : at + LOOK])
    again = _again(a, b)
    if again is None:
        return Differs(Difference.TEXT, at)
    i, j = again
    new, old = a[:i], b[:j]
    if _holds(b[j:], new) or _holds(a[i:], old):
        return Differs(Difference.ORDER, at, old, new)
    if i > SHORT or j > SHORT:
        return Differs(Difference.TEXT, at, old, new)
    if text is not None and _is_time(ours, at, i, text):
        return Differs(Difference.TIMESTAMP, at, old, new)
    return Differs(Difference.MARKER, at, old, new)


def _again(a: Sequence[int], b: Sequence[int]) -> tuple[int, int] | None:
    """Where the two have `WINDOW` tokens in common first, in the order of `a`."""
    where: dict[tuple[int, ...], int] = {}
    for j in range(len(b) - WINDOW, -1, -1):
        where[tuple(b[j : j + WINDOW])] = j
    for i in range(len(a) - WINDOW + 1):
        if (found := where.get(tuple(a[i : i + WINDOW]))) is not None:
            back = 0
            while back < min(i, found) and a[i - back - 1] == b[found - back - 1]:
                back += 1
            return i - back, found - back
    return None


def _holds(text: Sequence[int], piece: Sequence[int]) -> bool:
    """Whether most of a piece is in a text, in runs of `WINDOW` tokens."""
    if len(piece) < WINDOW:
        return False
    grams = {tuple(text[k : k + WINDOW]) for k in range(len(text) - WINDOW + 1)}
    found = sum(tuple(piece[k : k + WINDOW]) in grams for k in range(len(piece) - WINDOW + 1))
    return 2 * found > len(piece) - WINDOW + 1


def _is_time(ours: Sequence[int], at: int, length: int, text: Text) -> bool:
    before = text(ours[max(at - SHOWN, 0) : at])
    changed = text(ours[at : at + length])
    whole = before + changed + text(ours[at + length : at + length + SHOWN])
    low, high = len(before), len(before) + max(len(changed), 1)
    return any(m.start() < high and m.end() > low for m in _CLOCK.finditer(whole))
