"""Prompts of one length from a stream of token ids: with nothing shared, or with so much of it shared."""

from __future__ import annotations

import random
from collections.abc import Sequence


def unshared(stream: Sequence[int], count: int, length: int) -> list[list[int]]:
    """`count` windows of the stream, one after another.

    Raises:
        ValueError: it is too short.
    """
    if len(stream) < count * length:
        raise ValueError(f"{count} prompts of {length} tokens need {count * length}, and the text has {len(stream)}")
    return [list(stream[i * length : (i + 1) * length]) for i in range(count)]


def shared(
    stream: Sequence[int], count: int, length: int, *, share: float, families: int, seed: int = 0
) -> list[list[int]]:
    """`count` prompts in `families` that begin alike, in shuffled order.

    Args:
        share: of all positions, those that a prefix cache need not compute: each family's prefix once is computed.

    Raises:
        ValueError: families of one size cannot share so much, or the stream is too short.
    """
    size, left = divmod(count, families)
    prefix = round(share * length * size / (size - 1)) if size > 1 else length
    if left or prefix >= length:
        raise ValueError(f"{count} prompts in {families} families of {length} tokens cannot share {share:.0%}")
    rest = length - prefix
    if len(stream) < families * prefix + count * rest:
        raise ValueError("the text is too short")
    prefixes = unshared(stream, families, prefix)
    ends = unshared(stream[families * prefix :], count, rest)
    made = [[*prefixes[i % families], *end] for i, end in enumerate(ends)]
    random.Random(seed).shuffle(made)
    return made


def share_of(prompts: Sequence[Sequence[int]]) -> float:
    """Of all positions, those whose prompt begins, up to there, as an earlier one does."""
    seen: set[tuple[int, ...]] = set()
    again = total = 0
    for ids in prompts:
        key: tuple[int, ...] = ()
        for i in range(len(ids)):
            key = (hash(key), ids[i])
            again += key in seen
            total += 1
            seen.add(key)
    return again / total
