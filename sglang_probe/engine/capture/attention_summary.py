"""What one decode step attends to, in a few numbers per head, without its attention weights ever being stored.

Per region of positions (sinks, system prompt, rest of the prompt, window, generated, ...) two numbers are kept: the
log-sum-exp of the logits and the mean logit under the region's own weights. Mass by region and the entropy over any
union of regions follow from them exactly: an entropy is the log-sum-exp minus the mean logit. FlashInfer's paged decode
gives both as well (`slot_lists.py`), and no top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionSummary:
    """B requests, H sampled heads, R regions, K positions."""

    lse: Tensor
    """Log-sum-exp of the logits in each region, float32 `[B, H, R]`; -inf where the region is empty."""
    mean_logit: Tensor
    """Mean logit of each region under the weights within it, float32 `[B, H, R]`; 0 where it is empty."""
    top_positions: Tensor
    """Positions with most weight, int32 `[B, H, K]`, best first, of equal ones the earlier; -1 past the last key."""
    top_weights: Tensor
    """Their weights, float32 `[B, H, K]`; 0 past the last key."""
    first_logits: Tensor | None = None
    """Logits of the first keys of each request, if they were asked for, float32 `[B, H, P]`; -inf past them."""

    def mass(self) -> Tensor:
        """Weight on each region, `[B, H, R]`; sums to 1."""
        return torch.softmax(self.lse, -1)

    def entropy(self, *, without: Sequence[int] = ()) -> Tensor:
        """Entropy in nats, `[B, H]`, over all keys but those of the regions `without`, the rest renormalised.

        0 where no key is left.
        """
        others = [r for r in range(self.lse.shape[-1]) if r not in without]
        lse, mean = self.lse[..., others], self.mean_logit[..., others]
        total = torch.logsumexp(lse, -1)
        weights = torch.softmax(lse, -1)
        return torch.where(torch.isfinite(total), total - (weights * mean).sum(-1), 0.0)
