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
_NULLS = 99


@dataclass(frozen=True)
class ProbeResult:
    """AUC over held-out texts with its 95 % interval, and what exchanged labels give."""

    auc: float
    low: float
    high: float
    null_low: float
    """The central 95 % of the AUCs with exchanged labels."""
    null_high: float
    p: float
    """Share of them, the AUC counted in, that are as large."""


def probe(a_TCD: Array, b_TCD: Array, family: Array | None = None, *, seed: int = 0) -> ProbeResult:
    """Linear discriminant between two kinds of rows of the same texts.

    Folds are made of families of texts, so that none is on both sides. The direction is `(S + shrinkage)^-1 (mean_a -
    mean_b)` with the pooled within-class covariance S, shrunk towards its mean diagonal (Fisher 1936; Ledoit and Wolf
    2004, with a fixed weight). The interval is over families, the directions being those that were found. The null
    exchanges the two kinds within texts, each with probability one half, which keeps everything but the label, 99
    times.

    Args:
        a_TCD, b_TCD: `[texts, positions, width]`, of the same texts in the same order.
        family: of each text, `[texts]`, numbered from 0; None: each its own.
    """
    rng = np.random.default_rng(seed)
    texts = len(a_TCD)
    family = np.arange(texts) if family is None else family
    families = int(family.max()) + 1
    fold = (rng.permutation(families) % min(FOLDS, families))[family]
    folds = [_Fold(a_TCD, b_TCD, fold == k) for k in np.unique(fold)]

    def scores(swap: Array) -> tuple[Array, Array]:
        """Scores `[texts, positions]` of both kinds, each from a direction found without its text."""
        out = np.empty((2, *a_TCD.shape[:2]))
        for f in folds:
            a, b = f.scores(swap)
            out[:, f.test] = np.where(swap[f.test, None], [b, a], [a, b])
        return out[0], out[1]

    a, b = scores(np.zeros(texts, dtype=bool))
    whole = auc(a.ravel(), b.ravel())
    found = jackknife_interval(np.asarray(whole), auc_without(a, b, family), bounds=(0.0, 1.0))
    nulls = np.array([auc(*(x.ravel() for x in scores(rng.random(texts) < 0.5))) for _ in range(_NULLS)])
    low, high = np.quantile(nulls, [0.025, 0.975])
    p = (1 + int((nulls >= whole).sum())) / (1 + _NULLS)
    return ProbeResult(whole, float(found.low), float(found.high), float(low), float(high), p)


class _Fold:
    """One fold. Exchanging labels changes the means of the two kinds and not their common scatter, so that a null costs
    no pass over the training rows."""

    def __init__(self, a_TCD: Array, b_TCD: Array, test: Array) -> None:
        width = a_TCD.shape[-1]
        self.test = np.flatnonzero(test)
        self._a, self._b = a_TCD[test].astype(np.float64), b_TCD[test].astype(np.float64)
        both = np.concatenate([x[~test].reshape(-1, width).astype(np.float64) for x in (a_TCD, b_TCD)])
        both -= both.mean(axis=0)
        self._train = np.flatnonzero(~test)
        self._scatter = both.T @ both
        self._n = len(both)
        self._apart_TD = (a_TCD[~test].astype(np.float64) - b_TCD[~test]).sum(axis=1)

    def scores(self, swap: Array) -> tuple[Array, Array]:
        """Scores of the fold's own rows, unswapped, by the direction of its training rows under swapped labels."""
        sign = np.where(swap[self._train], -1.0, 1.0)
        apart = sign @ self._apart_TD / (self._n / 2)
        covariance = self._scatter / self._n - np.outer(apart, apart) / 4
        floor = np.trace(covariance) / len(apart)
        shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * floor * np.eye(len(apart))
        w = np.linalg.solve(shrunk, apart)
        return self._a @ w, self._b @ w
