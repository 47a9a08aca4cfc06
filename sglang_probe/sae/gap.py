"""The gap in reconstruction between two arms of the same texts, and what of it is another mixture of entropies.

Arms: `human` (human text, prefilled), `reforward` (the model's own text, prefilled) and `decode` (that text as it was
decoded). By text, `decode - human = (reforward - human) + (decode - reforward)`: content and numerics.

An SAE reconstructs rows of high entropy better, and a model that samples writes text of higher entropy than people
do. So the gap of two means is split (Kitagawa 1955; Oaxaca 1973), with the weights of the first arm:

    gap = sum_b w_b (G_b - F_b)   within bands     +     sum_b (v_b - w_b) G_b   composition

where F, G are the FVU of the bands and w, v their shares of the rows, in the first arm and the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.stats.intervals import Interval, jackknife_interval

Array = np.ndarray[Any, Any]
FIXED_BANDS = (0.5, 2.0, 4.0)
"""Cut points in nats, for comparisons between models."""


@dataclass(frozen=True)
class Gap:
    """Second arm minus first, in units of the reference variance; intervals over texts."""

    total: Interval
    within: Interval
    composition: Interval
    texts: int
    bands: pd.DataFrame
    """By `band`: `low` and `high` entropy, `fvu_first`, `fvu_second`, `share_first`, `share_second`."""


def quartiles(entropy_N: Array) -> tuple[float, ...]:
    """Cut points of four bands with as many rows each: of the human arm, so that a band means the same in every arm.

    Raises:
        ConfigError: so many entropies are equal that bands would be empty.
    """
    cuts = tuple(float(q) for q in np.quantile(entropy_N, [0.25, 0.5, 0.75]))
    if len(set(cuts)) < 3:
        raise ConfigError("more than a quarter of the rows have one entropy: bands by quartile would be empty")
    return cuts


def gap(first: pd.DataFrame, second: pd.DataFrame, *, variance: float, cuts: tuple[float, ...] | None = None) -> Gap:
    """The gap of two arms with its decomposition.

    Args:
        first, second: a row for each row of an arm: `text`, `error` (squared), `entropy` (nats).
        variance: of the human arm, sinks excluded: one denominator for all arms and bands.
        cuts: of the bands; default: quartiles of the first arm.

    Raises:
        ConfigError: the arms have different texts, or a band is empty in one of them.
    """
    texts = sorted(set(first["text"]))
    if texts != sorted(set(second["text"])):
        raise ConfigError("the two arms have different texts: a gap is between rows of the same ones")
    cuts = quartiles(first["entropy"].to_numpy()) if cuts is None else cuts
    tables = [_by_text(arm, texts, cuts) for arm in (first, second)]
    f, g = (t.sum(0) for t in tables)
    if wrong := [b for b in range(len(cuts) + 1) if not f[b, 1] or not g[b, 1]]:
        raise ConfigError(
            f"no row of one arm is in entropy band {wrong[0] + 1} of {len(cuts) + 1}", fix="give coarser bands"
        )
    estimate = _decompose(f, g, variance)
    without = np.stack([_decompose(f - a, g - b, variance) for a, b in zip(*tables, strict=True)])
    total, within, composition = (jackknife_interval(np.asarray(estimate[i]), without[:, i]) for i in range(3))
    edges = [-np.inf, *cuts, np.inf]
    bands = pd.DataFrame(
        {
            "band": range(1, len(edges)),
            "low": edges[:-1],
            "high": edges[1:],
            **{f"fvu_{n}": t[:, 0] / t[:, 1] / variance for n, t in (("first", f), ("second", g))},
            **{f"share_{n}": t[:, 1] / t[:, 1].sum() for n, t in (("first", f), ("second", g))},
        }
    )
    return Gap(total, within, composition, len(texts), bands)


def _by_text(arm: pd.DataFrame, texts: list[Any], cuts: tuple[float, ...]) -> Array:
    """Sum of errors and number of rows by text and band, `[T, B, 2]`."""
    at = pd.Index(texts).get_indexer(arm["text"])
    band = np.searchsorted(cuts, arm["entropy"].to_numpy(), side="right")
    out = np.zeros((len(texts), len(cuts) + 1, 2))
    np.add.at(out, (at, band, 0), arm["error"].to_numpy(np.float64))
    np.add.at(out, (at, band, 1), 1)
    return out


def _decompose(first: Array, second: Array, variance: float) -> Array:
    """Total, within and composition, from sums of errors and numbers of rows by band, `[B, 2]` each. A band that a
    text alone filled has no FVU without it: NaN, which the jackknife takes for "needs that text"."""
    with np.errstate(invalid="ignore", divide="ignore"):
        f, g = (a[:, 0] / a[:, 1] / variance for a in (first, second))
        w, v = (a[:, 1] / a[:, 1].sum() for a in (first, second))
    within, composition = (w * (g - f)).sum(), ((v - w) * g).sum()
    found = np.array([within + composition, within, composition])
    return np.where(np.isnan(found), np.inf, found)
