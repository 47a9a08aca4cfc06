"""The positions that every sensible policy keeps, and what is left to choose from."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_probe.errors import ProbeError
from sglang_probe.eviction.select import protected_mask


def trivial_mask(length: int, *, sinks: int = 4, window: int = 32) -> Tensor:
    """F: the first `sinks` and the last `window` prompt positions, bool `[L]`. Its complement C holds the
    candidates."""
    return protected_mask(length, sinks=sinks, recent=window)


def candidate_budget(budget: int, trivial_L: Tensor) -> int:
    """b': what a budget leaves for candidates after F.

    Raises:
        ProbeError: nothing is left, or there are no candidates.
    """
    free = int((~trivial_L).sum())
    left = min(budget - int(trivial_L.sum()), free)
    if left <= 0:
        raise ProbeError(
            f"a budget of {budget} leaves no candidate after {int(trivial_L.sum())} trivial positions "
            f"of {len(trivial_L)}",
            fix="raise the budget, or judge with fewer sinks or a shorter window",
        )
    return left


def candidate_share(keep_TGL: Tensor, trivial_L: Tensor) -> Tensor:
    """Kept share of the candidates, `[..., T, G]`: the exact chance level of overlap and of non-trivial mass.

    It is what a policy that keeps as many candidates per head, but draws them at random, reaches in expectation.
    """
    free = ~trivial_L
    return (keep_TGL & free).sum(-1).to(torch.float32) / free.sum()
