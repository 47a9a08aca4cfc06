"""Equivalence: evidence that an effect is small, which a test that finds nothing is not."""

from __future__ import annotations

from typing import Literal


def within(low: float, high: float, margin: float) -> Literal["equivalent", "different", "unresolved"]:
    """What an interval says of a margin: wholly inside, wholly outside, or neither. NaN is unresolved."""
    if -margin < low and high < margin:
        return "equivalent"
    if low >= margin or high <= -margin:
        return "different"
    return "unresolved"
