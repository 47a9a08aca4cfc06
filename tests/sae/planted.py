"""Rows whose features are known: what every statistic of dictionaries must recover.

As the generator of SAELens (`sae_lens.synthetic`: a dictionary of unit directions, features that fire independently at
rates of their own, positive magnitudes), small, and with a seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Planted:
    """A dictionary and how often its features fire."""

    directions: Array
    """Unit rows `[F, D]`."""
    rates: Array
    """`[F]`"""

    @classmethod
    def make(cls, features: int = 24, width: int = 32, active: float = 3, seed: int = 0) -> Planted:
        """Random directions, and rates that fall like Zipf's and sum to `active`."""
        rng = np.random.default_rng(seed)
        d = rng.normal(size=(features, width))
        rates = 1 / np.arange(3, features + 3)
        return cls(d / np.linalg.norm(d, axis=1, keepdims=True), rates * active / rates.sum())

    def codes(self, n: int, seed: int, rates: Array | None = None) -> Array:
        """Magnitudes `[n, F]`: 0, or uniform from 1 to 2."""
        rng = np.random.default_rng(seed)
        size = (n, len(self.rates))
        fires = rng.random(size) < (self.rates if rates is None else rates)
        return fires * rng.uniform(1, 2, size)

    def rows(self, n: int, seed: int, *, rates: Array | None = None, noise: float = 0.02) -> torch.Tensor:
        """Rows `[n, D]`, float32, with a mean and a little noise."""
        rng = np.random.default_rng([seed, 1])
        x = self.codes(n, seed, rates) @ self.directions + noise * rng.normal(size=(n, self.directions.shape[1]))
        return torch.from_numpy((x + 0.3).astype(np.float32))
