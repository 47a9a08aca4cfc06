"""From scores to kept sets, with budgets that may differ by layer and head.

Ties are broken by position: of equal scores the earlier position is kept. Everything is a stable sort, so the outcome
does not depend on the device or on the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_probe.errors import ProbeError


def protected_mask(length: int, *, sinks: int, recent: int) -> Tensor:
    """The first `sinks` and the last `recent` positions, bool `[L]`."""
    position = torch.arange(length)
    return (position < sinks) | (position >= length - recent)


def ranks(scores: Tensor) -> Tensor:
    """Rank of each entry along the last axis, 0 for the highest score; of equal scores the earlier one ranks first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    return torch.empty_like(order).scatter_(-1, order, places)


def top_k(scores: Tensor, budgets: Tensor | int, protected: Tensor) -> Tensor:
    """Keep the protected positions and then the highest scores, `budgets` positions in all.

    Args:
        scores: `[..., L]`, finite.
        budgets: `[...]`, or one number; more than L keeps everything.
        protected: bool, broadcast to `scores`.

    Returns:
        bool `[..., L]` with exactly `min(budget, L)` true per row.

    Raises:
        ProbeError: a score is not finite, or a budget does not hold the protected positions.
    """
    if not bool(scores.isfinite().all()):
        raise ProbeError("a score is not finite", fix="check the captured queries and keys for NaN or infinity")
    length = scores.shape[-1]
    budgets = torch.as_tensor(budgets, device=scores.device).clamp(max=length)
    protected = protected.to(scores.device).expand(scores.shape)
    check_budget(budgets, protected)
    return ranks(scores.masked_fill(protected, torch.inf)) < budgets[..., None]


def check_budget(budgets: Tensor, protected: Tensor) -> None:
    """Refuse budgets `[...]` that do not hold the protected positions `[..., L]`.

    Raises:
        ProbeError: with the numbers and what to change.
    """
    needed = protected.sum(-1)
    if bool((needed > budgets).any()):
        raise ProbeError(
            f"a budget of {int(budgets.min())} does not hold the {int(needed.max())} protected positions",
            fix="raise the budget, or lower `sinks`, `recent` or `window`",
        )


def share_out(weights: Tensor, total: Tensor) -> Tensor:
    """Integers proportional to `weights` that sum to `total`, by largest remainder.

    Args:
        weights: `[..., G]`, non-negative, not all zero, with `sum == total` up to rounding.
        total: integers `[...]`.
    """
    whole = weights.floor()
    missing = total - whole.sum(-1).to(torch.int64)
    return whole.to(torch.int64) + (ranks(weights - whole) < missing[..., None]).to(torch.int64)
