"""Which decode rows a monitor reads, and with what probability.

A profile and what is judged by it are sampled by one rule: rows that were chosen for their entropy are unusual next to
rows that were not, whatever the model does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field, model_validator

from sglang_probe.config import Config

Array = np.ndarray[Any, Any]


class ByEntropy(Config):
    """Rows are drawn by chance: where the model is unsure of the next token more of them."""

    above: float = Field(gt=0, allow_inf_nan=False)
    """Nats of the model's next-token distribution, before sampling parameters."""
    high: int = Field(default=4, ge=1)
    """One row in so many is read above it."""
    low: int = Field(default=64, ge=1)
    """One row in so many is read elsewhere."""

    @model_validator(mode="after")
    def _ordered(self) -> ByEntropy:
        if self.low < self.high:
            raise ValueError("`low` is at least `high`: fewer rows are read where the model is sure")
        return self

    def probability(self, entropy_N: Array) -> Array:
        """Inclusion probability of rows, float64 `[N]`."""
        return np.where(entropy_N > self.above, 1 / self.high, 1 / self.low)


class Sampling(Config):
    """The rule; one of the two."""

    every: int = Field(default=16, ge=1)
    """Decode steps 1, 1 + every, 1 + 2 · every, ..."""
    entropy: ByEntropy | None = None
    """By entropy instead: then `every` is not used."""

    @model_validator(mode="after")
    def _one_rule(self) -> Sampling:
        if self.entropy is not None and self.every != type(self).model_fields["every"].default:
            raise ValueError("`every` and `entropy` are two rules: leave one out")
        return self

    def candidates(self, step_N: Array, draw_N: Array) -> Array:
        """Rows that may be read, bool `[N]`; by entropy those whose entropy is worth computing.

        Args:
            step_N: decode step of each row, from 0. draw_N: a draw from [0, 1) for each.
        """
        if self.entropy is None:
            return np.asarray(step_N % self.every == 0)
        return np.asarray(draw_N < 1 / self.entropy.high)

    def chosen(self, draw_N: Array, entropy_N: Array | None) -> tuple[Array, Array]:
        """Of candidates, which are read, bool `[N]`, and the inclusion probability of each, float64 `[N]`."""
        if self.entropy is None:
            return np.ones(len(draw_N), dtype=bool), np.full(len(draw_N), 1 / self.every)
        assert entropy_N is not None
        probability = self.entropy.probability(entropy_N)
        return draw_N < probability, probability
