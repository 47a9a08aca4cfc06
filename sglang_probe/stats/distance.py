"""Distances between two distributions over the candidates.

Inputs are non-negative weights `[..., n]` over candidates only; each is normalised first. Cosine of attention rows is
left out on purpose: rows with disjoint supports that share a sink of 0.5 have cosine 0.91.
"""

from __future__ import annotations

import torch
from torch import Tensor


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, `[...]`, between 0 and ln 2. Its square root is the distance."""
    p, q = normalised(a), normalised(b)
    m = (p + q) / 2
    return ((_kl(p, m) + _kl(q, m)) / 2).clamp(min=0)


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    """1 minus the shared mass, `[...]`."""
    return 1 - torch.minimum(normalised(a), normalised(b)).sum(-1)


def kl(true: Tensor, predicted: Tensor, *, smoothing: float) -> Tensor:
    """KL(true ‖ predicted) in nats, after `smoothing` is added to both normalised distributions, `[...]`."""
    p, q = (normalised(normalised(x) + smoothing) for x in (true, predicted))
    return _kl(p, q)


def normalised(x: Tensor) -> Tensor:
    """Weights that sum to 1 along the last axis; NaN where there is no weight."""
    return x / x.sum(-1, keepdim=True)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.xlogy(p, p) - torch.xlogy(p, torch.where(p > 0, q, 1.0))).sum(-1)
