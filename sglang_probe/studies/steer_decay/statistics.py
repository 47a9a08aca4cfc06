"""Effect, side effect and decay of one dose, from what each step of each text shows. No engine, no model.

The unit is the family of texts (of one shared prefix; else the text): effects are averaged within it first. The *depth
control* is human text, decoded by force to the same positions: what falls there as much as in the model's own text is
an effect of depth, not of decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import beta

from sglang_probe.stats.intervals import Interval, jackknife_interval, mean_intervals, mean_p, ratio_intervals
from sglang_probe.stats.multiple import holm

Array = np.ndarray[Any, Any]

OWN, HUMAN = "own text", "human text"
VECTOR, RANDOM, ZERO = "vector", "random", "zero dose"
DIFFERENCE = "own minus human"
MEASURES = ("shift", "kl", "projection")


def per_family(steps: pd.DataFrame, window: int) -> pd.DataFrame:
    """Means over the window, and over the steps after it, of each family.

    Args:
        steps: `family, source, arm, onset, offset` (step minus onset), and `shift, kl, projection`. Several random
            vectors, and several texts of a family, have several rows of one place.

    Returns:
        `source, arm, onset, family`, the measures within the window, and `after_shift, after_kl, after_projection`.
    """
    keys = ["source", "arm", "onset", "family"]
    within = steps["offset"].between(0, window - 1)
    after = steps["offset"] >= window
    inside = steps[within].groupby(keys)[list(MEASURES)].mean()
    later = steps[after].groupby(keys)[list(MEASURES)].mean().add_prefix("after_")
    return inside.join(later, how="left").reset_index()


def effects(families: pd.DataFrame) -> pd.DataFrame:
    """Of each source, arm and onset: mean of each measure over families with its interval (`shift`, `shift_low`,
    `shift_high`, ...), `sd` of the shift over families, `instability` (it over the mean's size), `anti` (share of
    families whose shift has the other sign than the mean; its interval is Clopper and Pearson's, 1934) and `families`.
    """
    rows: list[dict[str, Any]] = []
    names = [*MEASURES, *(f"after_{m}" for m in MEASURES)]
    for (source, arm, onset), mine in families.groupby(["source", "arm", "onset"], sort=False):
        found = mean_intervals(mine[names].to_numpy(np.float64))
        row: dict[str, Any] = {"source": source, "arm": arm, "onset": onset, "families": len(mine)}
        for j, name in enumerate(names):
            row |= {name: found.estimate[j], f"{name}_low": found.low[j], f"{name}_high": found.high[j]}
        shift = mine["shift"].to_numpy(np.float64)
        against = int((np.sign(shift) * np.sign(shift.mean()) < 0).sum())
        sd = float(shift.std(ddof=1)) if len(shift) > 1 else float("nan")
        low, high = binomial_interval(against, len(shift))
        instability = sd / abs(shift.mean()) if shift.mean() else float("nan")
        rows.append(
            {**row, "sd": sd, "instability": instability, "anti": against / len(shift), "anti_low": low}
            | {"anti_high": high}
        )
    order = {name: i for i, name in enumerate((OWN, HUMAN, VECTOR, RANDOM, ZERO))}
    rows.sort(key=lambda r: (order[r["source"]], order[r["arm"]], r["onset"]))
    return pd.DataFrame(rows)


def binomial_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share (Clopper and Pearson 1934)."""
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else float(beta.ppf(tail, k, n - k + 1))
    high = 1.0 if k == n else float(beta.ppf(1 - tail, k + 1, n - k))
    return low, high


def decay(families: pd.DataFrame, measure: str = "shift") -> pd.DataFrame:
    """How the vector's effect depends on the onset.

    Returns:
        For each source and for their difference, paired by family: `slope` (of the measure per doubling of the onset,
        least squares within each family) with `slope_low, slope_high`; `ratio` (last onset over first; none of the
        difference) with its ends; `p` of a slope of zero, `holm` (adjusted over the rows of the frame), `families`.
        Families without every onset take no part.
    """
    slopes: dict[str, pd.Series] = {}
    rows: list[dict[str, Any]] = []
    for source in (OWN, HUMAN):
        mine = families[(families["source"] == source) & (families["arm"] == VECTOR)]
        wide = mine.pivot(index="family", columns="onset", values=measure).sort_index(axis=1).dropna()
        if wide.shape[1] < 2 or wide.empty:
            continue
        slopes[source] = pd.Series(_slopes(wide.to_numpy(np.float64), list(wide.columns)), index=wide.index)
        ratio = ratio_intervals(wide.iloc[:, [-1]].to_numpy(np.float64), wide.iloc[:, [0]].to_numpy(np.float64))
        rows.append(_row(source, slopes[source].to_numpy(), ratio))
    if len(slopes) == 2:
        paired = (slopes[OWN] - slopes[HUMAN]).dropna()
        rows.append(_row(DIFFERENCE, paired.to_numpy(), None))
    found = pd.DataFrame(rows)
    return found.assign(holm=holm(found["p"].to_numpy(np.float64))) if rows else found


def after_curves(steps: pd.DataFrame, window: int) -> pd.DataFrame:
    """The vector's shift at each step after the window: `source, onset, after` (1: the first step that is not steered),
    `shift, low, high`. The tokens are forced and the residual stream is left alone there: what remains of the effect
    has come through the entries of the KV cache."""
    rows: list[dict[str, Any]] = []
    later = steps[(steps["arm"] == VECTOR) & (steps["offset"] >= window)]
    for (source, onset), mine in later.groupby(["source", "onset"], sort=False):
        wide = mine.groupby(["family", "offset"])["shift"].mean().unstack().sort_index(axis=1)
        found = mean_intervals(wide.to_numpy(np.float64))
        rows += [
            {"source": source, "onset": onset, "after": int(offset) - window + 1}
            | {"shift": found.estimate[j], "low": found.low[j], "high": found.high[j]}
            for j, offset in enumerate(wide.columns)
        ]
    return pd.DataFrame(rows, columns=["source", "onset", "after", "shift", "low", "high"])


def half_lives(steps: pd.DataFrame, window: int) -> pd.DataFrame:
    """Steps after the window until the mean shift is half of that at the first of them, interpolated: `source, onset,
    half_life, low, high, censored`. Censored: it is not half within the steps that were measured; the half-life is then
    missing. There is an interval only where it is reached whichever family is left out."""
    rows: list[dict[str, Any]] = []
    later = steps[(steps["arm"] == VECTOR) & (steps["offset"] >= window)]
    for (source, onset), mine in later.groupby(["source", "onset"], sort=False):
        wide = mine.groupby(["family", "offset"])["shift"].mean().unstack().sort_index(axis=1).dropna()
        x = wide.to_numpy(np.float64)
        whole = half_life(x.mean(0))
        without = np.array([half_life((x.sum(0) - one) / (len(x) - 1)) for one in x]) if len(x) > 1 else np.array([])
        known = np.isfinite(whole) and np.isfinite(without).all() and len(without)
        ends = jackknife_interval(np.asarray(whole), without, bounds=(0, np.inf)) if known else None
        rows.append(
            {
                "source": source,
                "onset": onset,
                "half_life": whole if np.isfinite(whole) else np.nan,
                "low": np.nan if ends is None else float(ends.low),
                "high": np.nan if ends is None else float(ends.high),
                "censored": not np.isfinite(whole),
            }
        )
    frame = pd.DataFrame(rows, columns=["source", "onset", "half_life", "low", "high", "censored"])
    return frame.sort_values(["source", "onset"], ascending=[False, True], ignore_index=True)  # the model's own first


def half_life(curve: Array) -> float:
    """Steps after the first until a curve is at most half of its first value, interpolated; infinite: it never is. A
    curve that starts at zero has none (infinite)."""
    if len(curve) == 0 or curve[0] == 0:
        return float("inf")
    left = curve / curve[0]
    at = np.flatnonzero(left <= 0.5)
    if not len(at):
        return float("inf")
    i = int(at[0])
    return float(i - 1 + (left[i - 1] - 0.5) / (left[i - 1] - left[i]))


def _slopes(values_FS: Array, onsets: Sequence[int]) -> Array:
    x = np.log2(np.asarray(onsets, dtype=np.float64))
    x = x - x.mean()
    return np.asarray(values_FS @ x / (x @ x))


def _row(source: str, slopes: Array, ratio: Interval | None) -> dict[str, Any]:
    found = mean_intervals(slopes[:, None])
    told = {"slope": found.estimate[0], "slope_low": found.low[0], "slope_high": found.high[0]}
    ends = [np.nan] * 3 if ratio is None else [x[0] for x in (ratio.estimate, ratio.low, ratio.high)]
    return {
        "what": source,
        **told,
        **dict(zip(("ratio", "ratio_low", "ratio_high"), ends, strict=True)),
        "p": float(mean_p(slopes[:, None])[0]),
        "families": len(slopes),
    }
