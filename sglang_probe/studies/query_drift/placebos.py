"""What is said beside a number of the drift study: the same number at borders where nothing happens, and a test.

The unit is the prompt family, as everywhere. Its true border and its placebo borders are exchangeable if decoding is
nothing special (`sglang_probe.stats.placebo`); layers and heads of a request share their borders, so that an average
over layers has a placebo of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.stats.intervals import ratio_intervals
from sglang_probe.stats.multiple import benjamini_hochberg
from sglang_probe.stats.placebo import placebo_p, within_sd
from sglang_probe.studies.query_drift.horizon import first_failure
from sglang_probe.studies.query_drift.options import DriftOptions

_TRUE = -1
"""Number of the true border among placebo borders."""

Array = np.ndarray[Any, Any]


def beside_excess(found: pd.DataFrame, excess: pd.DataFrame, placebo: pd.DataFrame, whole: str) -> pd.DataFrame:
    """`found` (layer, kind, distance) with what placebo borders show.

    Args:
        excess: by request: layer, kind, distance, cluster, `excess`, `pairs`.
        placebo: the same with `border`.
        whole: name of the layer that stands for all of them.

    Returns:
        Added: `placebo`, the mean over placebo borders; `placebo_sd`, the standard deviation of a single one, within
        families; `borders`, how many there are; `beyond`, the excess beyond the family's placebo mean with its interval
        over families `beyond_low` and `_high`; `p` of the exchange of borders; and `q`, after Benjamini and Hochberg
        over the distances and kinds (of all layers together), or over layers, too (of each layer).
    """
    by = ["layer", "kind", "distance"]
    values = pd.concat([excess.assign(border=_TRUE), placebo])
    sums = values.assign(total=values["excess"] * values["pairs"]).groupby([*by, "cluster", "border"], sort=False)
    sums = sums[["total", "pairs"]].sum().reset_index()
    sums["value"] = sums["total"] / sums["pairs"]
    rows = []
    for key, part in sums.groupby(by, sort=False):
        wide = part.pivot(index="cluster", columns="border", values="value")
        weight = part[part["border"] == _TRUE].set_index("cluster")["pairs"].reindex(wide.index).fillna(0)
        rows.append({**dict(zip(by, key, strict=True)), **_tested(wide, weight.to_numpy(np.float64))})
    out = found.merge(pd.DataFrame(rows), on=by, how="left")
    out["q"] = np.nan
    for of_all in (True, False):
        mine = (out["layer"] == whole) == of_all
        out.loc[mine, "q"] = benjamini_hochberg(out.loc[mine, "p"].to_numpy(np.float64))
    return out


def _tested(wide: pd.DataFrame, weight: Array) -> dict[str, float]:
    """One cell: families by borders."""
    columns = [_TRUE, *(c for c in wide.columns if c != _TRUE)]
    values = wide.reindex(columns=columns).to_numpy(np.float64)
    placebos = values[:, 1:]
    count = (~np.isnan(placebos)).sum(1)
    mean = np.where(count > 0, np.nansum(placebos, 1) / np.maximum(count, 1), np.nan)
    beyond = values[:, 0] - mean
    use = ~np.isnan(beyond)
    found = _weighted(beyond[use], weight[use])
    return {
        "placebo": float(np.average(mean[use], weights=weight[use])) if use.any() else float("nan"),
        "placebo_sd": within_sd(placebos),
        "borders": int(count.sum()),
        "beyond": found[0],
        "beyond_low": found[1],
        "beyond_high": found[2],
        "p": placebo_p(values, weight),
    }


def _weighted(values: Array, weight: Array) -> tuple[float, float, float]:
    if not len(values):
        return (float("nan"),) * 3
    found = ratio_intervals((values * weight)[:, None], weight[:, None])
    return float(found.estimate[0]), float(found.low[0]), float(found.high[0])


def beside_horizon(
    found: pd.DataFrame, recall: pd.DataFrame, placebo: pd.DataFrame, o: DriftOptions, whole: str
) -> pd.DataFrame:
    """`found` (layer, baseline) with the horizon at placebo borders.

    A horizon that its response cut short cannot be averaged, so the comparison is over the first `upto` steps, which
    all responses and placebo borders have: the mean number of them before the first failure (the restricted mean of a
    survival curve).

    Returns:
        Added: `upto`; `upto_mean` at the true border and `placebo_mean`; `beyond` with its interval over families; `p`.
    """
    keys = ["layer", "cluster", "rid", "border"]
    both = pd.concat([recall.assign(border=_TRUE), placebo])
    pooled = both.groupby(["cluster", "rid", "border", "step"], sort=False)[["window", "recency", "random"]].mean()
    both = pd.concat([both.assign(layer=both["layer"].astype(str)), pooled.reset_index().assign(layer=whole)])
    last = both.groupby(keys, sort=False)["step"].transform("max")
    true = both["border"] == _TRUE
    upto = int(last[true].min())
    if not true.all():
        upto = min(
            upto, int(last[~true].median())
        )  # earlier turns may be short, and those that are shorter say nothing
    both = both[last >= upto]
    ends = []
    for key, part in both[both["step"] <= upto].groupby(keys, sort=False):
        window = part["window"].to_numpy()
        ends += [
            {**dict(zip(keys, key, strict=True)), "baseline": b, "end": _end(window - part[b].to_numpy(), upto, o)}
            for b in found["baseline"].unique()
        ]
    rows = []
    for (layer, baseline), part in pd.DataFrame(ends).groupby(["layer", "baseline"], sort=False):
        wide = part.groupby(["cluster", "border"])["end"].mean().unstack()
        tested = _tested(wide, np.ones(len(wide)))
        means = {"upto_mean": float(wide[_TRUE].mean()), "placebo_mean": tested["placebo"]}
        kept = {k: tested[k] for k in ("beyond", "beyond_low", "beyond_high", "p")}
        rows.append({"layer": layer, "baseline": baseline, "upto": upto, **means, **kept})
    return found.merge(pd.DataFrame(rows), on=["layer", "baseline"], how="left")


def _end(advantage: Array, upto: int, o: DriftOptions) -> float:
    step, failed = first_failure(advantage, delta=o.delta, run=o.run)
    return float(step if failed else upto)
