"""Two answers to the same request, compared: log-probabilities position by position, and where their tokens part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sglang_probe.gate.client import Answer, Array


@dataclass(frozen=True)
class Pair:
    """How far two answers are apart, in nats."""

    prompt: Array
    """|difference| at each token of the prompt that both were asked for, in the order of positions."""
    output: Array
    """|difference| at each generated token up to the first that differs, and there too."""
    parted: int | None
    """Which generated token differs first, or is in one answer alone; None: none. That is a greedy flip."""

    @property
    def all(self) -> Array:
        """`prompt` and `output`."""
        return np.concatenate([self.prompt, self.output])

    @property
    def mean(self) -> float:
        """Mean |difference|; NaN without a position."""
        return float(self.all.mean()) if len(self.all) else float("nan")

    @property
    def typical(self) -> float:
        """Median |difference|: half of the positions from the border of reuse on are at least so far apart."""
        return float(np.median(self.all)) if len(self.all) else float("nan")

    @property
    def most(self) -> float:
        """Largest |difference|."""
        return float(self.all.max()) if len(self.all) else float("nan")

    @property
    def equal(self) -> bool:
        """Whether tokens and log-probabilities are the same to the last bit, of one position at least."""
        return self.parted is None and len(self.all) > 0 and not self.all.any()


def compare(a: Answer, b: Answer, *, outputs: bool = True) -> Pair:
    """Compare where both have something to compare.

    Args:
        outputs: whether both were asked to go on from the same prompt, by as many tokens; else only the prompt's tokens
            are compared, as many as both have from the border on.
    """
    n = min(len(a.prompt), len(b.prompt))
    prompt = np.abs(a.prompt[:n] - b.prompt[:n])
    if not outputs:
        return Pair(prompt, np.zeros(0), None)
    m = min(len(a.output), len(b.output))
    parted = next((i for i in range(m) if a.output[i] != b.output[i]), None)
    if parted is None and len(a.output) != len(b.output):
        parted = m  # one of them ended there
    same = m if parted is None else parted
    output = np.abs(a.chosen[:same] - b.chosen[:same])
    if parted is not None and parted < min(m, len(a.top), len(b.top)):
        apart = max(_apart(a, b.top[parted], parted), _apart(b, a.top[parted], parted))
        output = np.append(output, apart)
    return Pair(prompt, output, parted)


def _apart(one: Answer, other: Mapping[int, float], at: int) -> float:
    """How much less, or more, probable the other finds this token; at least that, where its list does not have it."""
    mine = float(one.chosen[at])
    token = one.output[at]
    if token in other:
        return abs(mine - other[token])
    return max(0.0, mine - min(other.values(), default=mine))
