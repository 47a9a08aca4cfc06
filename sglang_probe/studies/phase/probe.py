"""A linear probe: can a direction tell two kinds of rows apart, on texts it has not seen?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_probe.stats.auc import auc, auc_without
from sglang_probe.stats.intervals import jackknife_interval

Array = np.ndarray[Any, Any]

FOLDS = 5
SHRINKAGE = 0.1
_NULLS = 10


@dataclass(frozen=True)
class ProbeResult:
    """AUC over held-out texts with its 95 % interval, and the range of AUCs with exchanged labels."""

    auc: float
    low: float
    high: float
    null_low: float
    null_high: float


def probe(a_TCD: Array, b_TCD: Array, *, seed: int = 0) -> ProbeResult:
    """Linear discriminant between two kinds of rows of the same texts.

    Folds are made of texts, so that no text is on both sides. The direction is `(S + shrinkage)^-1 (mean_a - mean_b)`
    with the pooled within-class covariance S, shrunk towards its mean diagonal (Fisher 1936; Ledoit and Wolf 2004, with
    a fixed weight). The interval is over texts, the directions being those that were found. The null exchanges the two
    kinds within texts, each with probability one half, which keeps everything but the label; its range is that of ten
    draws.

    Args:
        a_TCD, b_TCD: `[texts, positions, width]`, of the same texts in the same order.
    """
    rng = np.random.default_rng(seed)
    fold = rng.permutation(len(a_TCD)) % min(FOLDS, len(a_TCD))
    a, b = _held_out_scores(a_TCD, b_TCD, fold)
    whole = auc(a.ravel(), b.ravel())
    found = jackknife_interval(np.asarray(whole), auc_without(a, b), bounds=(0.0, 1.0))
    nulls = []
    for _ in range(_NULLS):
        swap = rng.random(len(a_TCD)) < 0.5
        x, y = (np.where(swap[:, None, None], *pair) for pair in ((b_TCD, a_TCD), (a_TCD, b_TCD)))
        nulls.append(auc(*(s.ravel() for s in _held_out_scores(x, y, fold))))
    return ProbeResult(whole, float(found.low), float(found.high), min(nulls), max(nulls))


def _held_out_scores(a_TCD: Array, b_TCD: Array, fold: Array) -> tuple[Array, Array]:
    """Scores `[texts, positions]` of both kinds, each from a direction found without its text."""
    scores_a, scores_b = np.empty(a_TCD.shape[:2]), np.empty(b_TCD.shape[:2])
    for k in np.unique(fold):
        train, test = fold != k, fold == k
        w = _direction(a_TCD[train], b_TCD[train])
        scores_a[test], scores_b[test] = a_TCD[test] @ w, b_TCD[test] @ w
    return scores_a, scores_b


def _direction(a_TCD: Array, b_TCD: Array) -> Array:
    width = a_TCD.shape[-1]
    a, b = (x.reshape(-1, width).astype(np.float64) for x in (a_TCD, b_TCD))
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    scatter = (a - mean_a).T @ (a - mean_a) + (b - mean_b).T @ (b - mean_b)
    covariance = scatter / (len(a) + len(b))
    floor = np.trace(covariance) / width
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * floor * np.eye(width)
    return np.asarray(np.linalg.solve(shrunk, mean_a - mean_b))
