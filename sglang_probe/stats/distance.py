"""Distances: between captured rows, and between two distributions over the candidates.

Distributions are given as non-negative weights `[..., n]` over candidates only; each is normalised first. Cosine of
attention rows is left out on purpose: rows with disjoint supports that share a sink of 0.5 have cosine 0.91.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def row_distance(a_ND: Tensor, b_ND: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Relative L2 `‖a - b‖ / ‖b‖`, cosine, and largest absolute difference of rows, each `[n]` in float64. Identical
    rows give exactly 0, 1 and 0."""
    a, b = a_ND.double(), b_ND.double()
    norm = b.norm(dim=1)
    difference = a - b
    l2 = difference.norm(dim=1) / norm.clamp_min(torch.finfo(torch.float64).tiny)
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(max=1.0)
    same = (a_ND == b_ND).all(dim=1)
    return (
        np.asarray(torch.where(same, 0.0, l2)),
        np.asarray(torch.where(same, 1.0, cosine)),
        np.asarray(difference.abs().amax(dim=1)),
    )


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats, `[...]`, between 0 and ln 2. Its square root is the distance."""
    p, q = normalised(a), normalised(b)
    log_m = _log((p + q) / 2)
    # By `log` and not `xlogy`, which is not vectorised, and in place: drift studies spend most of their time here.
    part_p = (_log(p) - log_m).mul_(p)
    part_q = (_log(q) - log_m).mul_(q)
    return (part_p.add_(part_q).sum(-1) / 2).clamp(min=0)


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


def _log(p: Tensor) -> Tensor:
    """A new tensor of logarithms, finite where `p` is 0."""
    return p.clamp(min=torch.finfo(p.dtype).tiny).log_()
