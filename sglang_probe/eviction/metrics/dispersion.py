"""How unevenly heads fare: quantiles, Gini, coefficient of variation, heads below chance, and tokens lost
everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_probe.errors import ProbeError


@dataclass(frozen=True)
class Spread:
    """A quantity over layers and heads. Entries that are NaN (a head without non-trivial mass) are left out."""

    heads: int
    mean: float
    q05: float
    q50: float
    q95: float
    gini: float
    cv: float


def spread(values: Tensor) -> Spread:
    """Summary over all entries of `values`, one per layer and head.

    Raises:
        ProbeError: no entry is a number.
    """
    x = values.flatten().to(torch.float64)
    x = x[~x.isnan()]
    if not len(x):
        raise ProbeError("no head has a value to summarise")
    q05, q50, q95 = (float(q) for q in torch.quantile(x, torch.tensor([0.05, 0.5, 0.95], dtype=x.dtype)))
    mean = float(x.mean())
    cv = float(x.std(correction=0)) / mean if mean else float("nan")
    return Spread(len(x), mean, q05, q50, q95, gini(x), cv)


def gini(x: Tensor) -> float:
    """Gini coefficient of non-negative values: mean absolute difference of all pairs over twice the mean."""
    ordered = x.flatten().to(torch.float64).sort().values
    n, total = len(ordered), float(ordered.sum())
    if total == 0:
        return 0.0
    weight = 2 * torch.arange(1, n + 1, dtype=torch.float64) - n - 1
    return float((weight * ordered).sum()) / (n * total)


def share_below(values: Tensor, baseline: Tensor) -> float:
    """Share of heads where the policy is below the baseline, NaN entries left out."""
    valid = ~(values.isnan() | baseline.isnan())
    return float((values < baseline)[valid].to(torch.float64).mean())


def global_eviction_ratio(keep_XGL: Tensor, needed_L: Tensor) -> float:
    """Share of needed positions that no kv head of any layer keeps.

    Args:
        keep_XGL: bool, every leading axis is a layer (select the retrieval layers first, if that is the question).
        needed_L: bool.

    Raises:
        ProbeError: nothing is needed.
    """
    if not bool(needed_L.any()):
        raise ProbeError("no position is needed, so none can be lost")
    lost = ~keep_XGL.flatten(0, -2).any(0)
    return float(lost[needed_L].to(torch.float64).mean())


def global_eviction_chance(keep_XGL: Tensor, needed_L: Tensor, trivial_L: Tensor) -> float:
    """Expected ratio if every head drew as many candidates as it keeps at random and kept F. Exact.

    Heads draw independently, so a needed candidate is lost everywhere with the product of their evicted shares.
    """
    free = ~trivial_L
    share = (keep_XGL & free).sum(-1).to(torch.float64) / free.sum()
    return float((1 - share).prod() * (needed_L & free).sum() / needed_L.sum())
