"""The interval of a median from a handful of measurements, whatever their distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_probe.stats.intervals import LEAST_CLUSTERS


@dataclass(frozen=True)
class MedianInterval:
    """From one of the sorted values to another."""

    low: float
    high: float
    confidence: float
    """Exact: the share of such intervals that hold the median."""


def median_interval(values: Sequence[float], *, confidence: float = 0.9) -> MedianInterval | None:
    """The shortest interval between two values that lie symmetrically in order and holds the median at least so often.

    Exact for independent values of one continuous distribution: how many lie below its median is binomial with one half
    (David and Nagaraja 2003, Order Statistics, section 7.1). None with fewer than `LEAST_CLUSTERS` values.
    """
    n = len(values)
    if n < LEAST_CLUSTERS:
        return None
    covered = [1 - 2 * sum(math.comb(n, i) for i in range(left)) / 2**n for left in range(1, n // 2 + 1)]
    left = max((k for k, c in enumerate(covered) if c >= confidence), default=0)
    ordered = sorted(values)
    return MedianInterval(ordered[left], ordered[n - 1 - left], covered[left])
