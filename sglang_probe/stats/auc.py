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


def auc_without(positive_TC: Array, negative_TC: Array, group: Array) -> Array:
    """The area of all scores but those of one group of texts each, `[groups]`: what a jackknife over groups takes.

    Args:
        group: of each text, `[texts]`, numbered from 0.
    """
    positives, negatives = np.sort(positive_TC, axis=None), np.sort(negative_TC, axis=None)
    parts = [(positive_TC[group == g].ravel(), negative_TC[group == g].ravel()) for g in range(int(group.max()) + 1)]
    mine = np.array([_wins(p, negatives) for p, _ in parts])
    theirs = np.array([n.size * positives.size - _wins(n, positives) for _, n in parts])
    both = np.array([_wins(p, np.sort(n)) for p, n in parts])
    pairs = np.array([(positives.size - p.size) * (negatives.size - n.size) for p, n in parts])
    whole = _wins(positives, negatives)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((whole - mine - theirs + both) / pairs)


def _wins(values: Array, against: Array) -> float:
    """In how many pairs a value is above one of the sorted ones, ties counting half."""
    return float(sum(np.searchsorted(against, values, side=s).sum() for s in ("left", "right")) / 2)
