"""From numbers by row to tables by kind, contrast, depth, position, band of entropy and replacement.

`points` has a row for each position of each kind: `kind`, `text` (the unit of inference: a family of requests), `step`
(1 is the first position of the continuation), `position`, `sink`, and the columns of `measures`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ConfigError
from sglang_probe.sae.effect import difference, mean, ratio, recovered
from sglang_probe.sae.gap import FIXED_BANDS, gap, quartiles
from sglang_probe.stats.intervals import Interval
from sglang_probe.studies.phase.study import CONTRASTS, HUMAN
from sglang_probe.studies.sae_gap.runs import MEAN, RANDOM, SPLICED, ZERO

Array = np.ndarray[Any, Any]

DEPTHS = {"1": (1, 1), "around 8": (5, 12), "around 50": (38, 64), "around 200": (160, 224)}
"""Steps of each window, both ends included."""
LOOPS = 0.25
"""A text of which more 8-grams than this occurred in it before is a loop."""
ALL, WITHOUT_LOOPS = "all", "without loops"


def arms(points: pd.DataFrame, variance: float, own: Mapping[str, float], texts: pd.DataFrame) -> pd.DataFrame:
    """By kind: how well its rows are reconstructed, and what they are like.

    Args:
        own: variance of each kind's own rows. texts: `kind`, `text`, `repeated`, `distinct`.
    """
    rows = []
    for kind, mine in points.groupby("kind", sort=False):
        e, n = _sums(mine, "error")
        of = texts[texts["kind"] == kind]
        rows.append(
            {
                "kind": kind,
                **_ends("fvu", mean(e / variance, n)),
                "fvu_own": float(mine["error"].mean() / own[str(kind)]),
                "relative_error": float((mine["error"] / mine["squared_norm"]).median()),
                "l0": float(mine["active"].mean()),
                "entropy": float(mine["entropy"].mean()),
                "nll": float(mine["nll"].mean()),
                "distinct_2": float(of["distinct"].mean()),
                "repeated_8": float(of["repeated"].mean()),
                "loops": int((of["repeated"] > LOOPS).sum()),
                "texts": len(n),
                "rows": len(mine),
            }
        )
    return pd.DataFrame(rows)


def gaps(points: pd.DataFrame, variance: float, loops: set[Any], floors: Mapping[str, float]) -> pd.DataFrame:
    """By contrast, of all texts and of those that are no loops: the gap, within bands of entropy and by their mixture.

    Args:
        loops: texts. floors: by kind, what a repetition of its run changes; NaN: there was none.
    """
    rows = []
    for contrast, (second, first) in CONTRASTS.items():
        for of, left_out in ((ALL, set()), (WITHOUT_LOOPS, loops)):
            a, b = (points[(points["kind"] == k) & ~points["text"].isin(left_out)] for k in (first, second))
            row: dict[str, Any] = {"contrast": contrast, "texts": of, "n": a["text"].nunique()}
            row |= {"floor": max(floors[first], floors[second]), **_unknown("gap", "within", "composition")}
            if len(a):
                a_T, b_T = _sums(a, "error"), _sums(b, "error")
                both = difference(a_T[0] / variance, a_T[1], b_T[0] / variance, b_T[1])
                row |= _ends("gap", both)
                row |= _decomposed(points, a, b, variance)
            rows.append(row)
    return pd.DataFrame(rows)


def _decomposed(points: pd.DataFrame, a: pd.DataFrame, b: pd.DataFrame, variance: float) -> dict[str, float]:
    """The two parts; nothing where a band is empty."""
    try:
        cuts = quartiles(points.loc[points["kind"] == HUMAN, "entropy"].to_numpy())
        found = gap(a, b, variance=variance, cuts=cuts)
    except ConfigError:
        return {}
    return {**_ends("within", found.within), **_ends("composition", found.composition)}


def by_depth(points: pd.DataFrame, variance: float) -> pd.DataFrame:
    """By window of steps and contrast: the unexplained share of both kinds, and their difference."""
    windows = {name: points["step"].between(*ends) for name, ends in DEPTHS.items()}
    return _by(points, variance, "window", windows)


def by_position(points: pd.DataFrame, variance: float) -> pd.DataFrame:
    """The same by absolute position, in bins that double."""
    bins = 2 ** np.floor(np.log2(points["position"].to_numpy())).astype(int)
    named = {f"{b} to {2 * b - 1}": pd.Series(bins == b, points.index) for b in np.unique(bins)}
    return _by(points, variance, "position", named)


def by_band(points: pd.DataFrame, variance: float) -> pd.DataFrame:
    """The same by band of entropy: quartiles of human rows, and fixed ones; with the share of rows in each."""
    scales = {"quartile of human rows": _quartiles(points), "fixed, nats": FIXED_BANDS}
    frames = [_by(points, variance, "band", _bands(points, c)).assign(scale=s) for s, c in scales.items()]
    return pd.concat(frames, ignore_index=True)


def _quartiles(points: pd.DataFrame) -> tuple[float, ...]:
    """Of the entropy of human rows; none where they do not part the rows."""
    try:
        return quartiles(points.loc[points["kind"] == HUMAN, "entropy"].to_numpy())
    except ConfigError:
        return ()


def _bands(points: pd.DataFrame, cuts: Sequence[float]) -> dict[str, pd.Series]:
    """Rows of each band, by its name."""
    h = points["entropy"]
    found = {f"{a:.2f} to {b:.2f}": h.ge(a) & h.lt(b) for a, b in itertools.pairwise((0.0, *cuts))}
    last = cuts[-1] if cuts else 0.0
    return {**found, f"above {last:.2f}": h.ge(last)}


def _by(points: pd.DataFrame, variance: float, axis: str, named: Mapping[str, pd.Series]) -> pd.DataFrame:
    rows = []
    total = points.groupby("kind").size()
    for name, which in named.items():
        for contrast, (second, first) in CONTRASTS.items():
            a, b = (points[which & (points["kind"] == k)] for k in (first, second))
            row = {axis: name, "contrast": contrast, "rows_first": len(a), "rows_second": len(b)}
            row |= {"share_first": len(a) / total[first], "share_second": len(b) / total[second]}
            order = sorted(points["text"].unique())
            (ea, na), (eb, nb) = (_sums(x, "error", order) for x in (a, b))
            row |= {"fvu_first": _over(ea, na) / variance, "fvu_second": _over(eb, nb) / variance}
            row |= {"texts": int(((na > 0) & (nb > 0)).sum()), **_unknown("gap")}
            if row["texts"]:
                row |= _ends("gap", difference(ea / variance, na, eb / variance, nb))
            rows.append(row)
    return pd.DataFrame(rows)


def effects(points: pd.DataFrame, kinds: Sequence[str]) -> pd.DataFrame:
    """By kind and replacement: cross-entropy, divergence from the clean prediction, what is recovered, and the
    divergence relative to that of random errors of the same length."""
    rows = []
    for kind in kinds:
        mine = points[points["kind"] == kind].dropna(subset=["nll"])
        clean, n = _sums(mine, "nll")
        nll = {v: _sums(mine, f"nll_{v}")[0] for v in (SPLICED, RANDOM, MEAN, ZERO)}
        kl = {v: _sums(mine, f"kl_{v}")[0] for v in nll}
        for variant in nll:
            row = {"kind": kind, "replaced_by": variant, "rows": len(mine), "clean": _over(clean, n)}
            row |= {"nll": _over(nll[variant], n), **_ends("kl", mean(kl[variant], n))}
            row |= _unknown("recovered_mean", "recovered_zero", "kl_score_mean", "kl_score_zero", "times_random")
            if variant in (SPLICED, RANDOM):
                for name, nothing in (("mean", MEAN), ("zero", ZERO)):
                    row |= _ends(f"recovered_{name}", recovered(clean, nll[variant], nll[nothing], n))
                    row |= _ends(f"kl_score_{name}", recovered(0 * n, kl[variant], kl[nothing], n))
            if variant == SPLICED:
                row |= _ends("times_random", ratio(kl[SPLICED], kl[RANDOM]))
            rows.append(row)
    return pd.DataFrame(rows)


def effects_by(points: pd.DataFrame, kinds: Sequence[str]) -> pd.DataFrame:
    """The divergence of the SAE's errors and of random ones, by window of steps and band of entropy."""
    bands = _bands(points, _quartiles(points))
    depths = {name: points["step"].between(*ends) for name, ends in DEPTHS.items()}
    rows = []
    for axis, named in (("steps", depths), ("entropy, nats", bands)):
        for name, which in named.items():
            for kind in kinds:
                mine = points[which & (points["kind"] == kind)]
                if not len(mine):
                    continue
                (s, n), (r, _) = (_sums(mine, f"kl_{v}") for v in (SPLICED, RANDOM))
                row = {"axis": axis, "group": name, "kind": kind, "rows": len(mine)}
                row |= {**_ends("kl", mean(s, n)), "kl_random": _over(r, n), **_ends("times_random", ratio(s, r))}
                rows.append(row)
    return pd.DataFrame(rows)


def _sums(points: pd.DataFrame, column: str, order: Sequence[Any] | None = None) -> tuple[Array, Array]:
    """Sum of a column and number of rows by text, in the order of `order` or of the texts' names."""
    found = points.groupby("text")[column].agg(["sum", "count"])
    if order is not None:
        found = found.reindex(order, fill_value=0)
    return found["sum"].to_numpy(np.float64), found["count"].to_numpy(np.float64)


def _over(sums: Array, rows: Array) -> float:
    return float(sums.sum() / rows.sum()) if rows.sum() else float("nan")


def _unknown(*names: str) -> dict[str, float]:
    """A table has its columns also where there is no number."""
    return {f"{n}{end}": float("nan") for n in names for end in ("", "_low", "_high")}


def _ends(name: str, x: Interval) -> dict[str, float]:
    values = (np.asarray(v).reshape(-1)[0] for v in (x.estimate, x.low, x.high))
    return {n: float(v) for n, v in zip((name, f"{name}_low", f"{name}_high"), values, strict=True)}
