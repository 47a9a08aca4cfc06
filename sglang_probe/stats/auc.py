"""How well a score tells two classes apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import rankdata

Array = np.ndarray[Any, Any]


def auc(positive: Array, negative: Array) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    By ranks (Mann and Whitney 1947). NaN if a class is empty.
    """
    n, m = len(positive), len(negative)
    if n == 0 or m == 0:
        return float("nan")
    ranks = rankdata(np.concatenate([positive, negative]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def auc_without(positive_TC: Array, negative_TC: Array) -> Array:
    """The area of all scores but those of one text each, `[texts]`: what a jackknife over texts takes."""
    texts = len(positive_TC)
    positives, negatives = np.sort(positive_TC, axis=None), np.sort(negative_TC, axis=None)
    mine = np.array([_wins(p, negatives) for p in positive_TC])
    theirs = np.array([n.size * positives.size - _wins(n, positives) for n in negative_TC])
    both = np.array([_wins(p, np.sort(n)) for p, n in zip(positive_TC, negative_TC, strict=True)])
    pairs = positives.size * negatives.size * ((texts - 1) / texts) ** 2
    return np.asarray((mine.sum() - mine - theirs + both) / pairs)


def _wins(values: Array, against: Array) -> float:
    """In how many pairs a value is above one of the sorted ones, ties counting half."""
    return float(sum(np.searchsorted(against, values, side=s).sum() for s in ("left", "right")) / 2)
