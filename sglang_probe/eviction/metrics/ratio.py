"""Quotients that are pooled as ratio of sums, because their denominators go to zero."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Ratio:
    """A numerator and denominator of equal shape `[..., G, R, T]`: keep both, and report the denominator."""

    numerator: Tensor
    denominator: Tensor

    @property
    def each(self) -> Tensor:
        """The quotient of every entry; NaN where the denominator is 0."""
        return self.numerator / self.denominator

    def pooled(self, *dims: int) -> Tensor:
        """Sum of numerators over sum of denominators along `dims` (all when none is given)."""
        if not dims:
            return self.numerator.sum() / self.denominator.sum()
        return self.numerator.sum(dims) / self.denominator.sum(dims)
