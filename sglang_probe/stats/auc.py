"""How well a score tells two classes apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import rankdata

from sglang_probe.stats.intervals import LEAST_CLUSTERS, Interval, crossed_interval

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


def auc_interval(positive: Array, negative: Array, *, confidence: float = 0.95) -> Interval:
    """The area with its interval, of scores that are independent of each other, one a text.

    Both samples are drawn, so that what leaving out a positive and what leaving out a negative changes adds up (DeLong,
    DeLong and Clarke-Pearson 1988), each with degrees of freedom of its own. Where no pair is in the wrong order
    nothing varies; then the interval is what so many pairs of texts of their own, all in order, leave possible: k of k
    successes of a binomial. NaN with fewer than `LEAST_CLUSTERS` of either kind.

    Args:
        positive, negative: `[n]`, `[m]`, without NaN.
    """
    whole = auc(positive, negative)
    n, m = len(positive), len(negative)
    nothing = Interval(np.asarray(whole), np.asarray(np.nan), np.asarray(np.nan))
    if min(n, m) < LEAST_CLUSTERS:
        return nothing
    if whole in (0.0, 1.0):
        far = ((1 - confidence) / 2) ** (1 / min(n, m))
        low, high = (far, 1.0) if whole == 1.0 else (0.0, 1 - far)
    else:
        wins_N = _shares(positive, np.sort(negative))
        wins_M = 1 - _shares(negative, np.sort(positive))
        without = [(x.sum() - x) / (len(x) - 1) for x in (wins_N, wins_M)]
        low, high = crossed_interval(whole, *without, confidence=confidence, bounds=(0.0, 1.0))
    return Interval(np.asarray(whole), np.asarray(low), np.asarray(high))


def roc(positive: Array, negative: Array) -> Array:
    """The ROC curve `[points, 3]`: threshold, share of negatives and share of positives above it, thresholds falling
    through every score from the largest on."""
    thresholds = np.unique(np.concatenate([positive, negative]))[::-1]
    above = [(len(x) - np.searchsorted(np.sort(x), thresholds, side="right")) / len(x) for x in (negative, positive)]
    return np.stack([thresholds, *above], axis=1)


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


def _shares(values: Array, against: Array) -> Array:
    """Of each value, the share of sorted others that it is above, ties counting half."""
    below, upto = (np.searchsorted(against, values, side=s) for s in ("left", "right"))
    return np.asarray((below + upto) / (2 * len(against)))
