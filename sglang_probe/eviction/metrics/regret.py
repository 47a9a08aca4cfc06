"""A policy against its bounds: regret to an oracle, and the share of the gap to protected random that it closes."""

from __future__ import annotations

import torch
from torch import Tensor


def regret(policy: Tensor, oracle: Tensor) -> Tensor:
    """U(oracle) - U(policy). Never negative only where the oracle is the optimum of this very utility."""
    return oracle - policy


def gap_closed(policy: Tensor, oracle: Tensor, protected_random: Tensor) -> Tensor:
    """(U(policy) - U(protected random)) / (U(oracle) - U(protected random)); NaN where the oracle gains nothing.

    Pool the utilities over steps and heads first: a mean of these quotients is ruled by heads without a gap.
    """
    gap = oracle - protected_random
    return torch.where(gap > 0, (policy - protected_random) / gap, torch.nan)
