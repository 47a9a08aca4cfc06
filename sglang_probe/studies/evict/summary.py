"""From numbers per request to tables: means with intervals, paired differences to protected random, gaps closed.

The unit is the prompt. Differences are paired within prompts, and their p-values ("the mean difference is zero", by the
test that belongs to the intervals) are adjusted after Holm over all methods and budgets of a task and protocol.
Oracles, controls, and methods as published, which do not protect what the baseline does, are shown and not tested.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.stats.intervals import mean_intervals, mean_p, ratio_intervals
from sglang_probe.stats.multiple import holm
from sglang_probe.studies.evict.grid import BASELINE

Array = np.ndarray[Any, Any]

KINDS = ("full", "baseline", "method", "published", "oracle", "control")
"""Order of listings."""


def means(rows: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """Means over prompts of each metric, by cell, with intervals and paired differences to protected random.

    Args:
        rows: one row per cell and request: the columns of `offline.CELL`, `rid`, and the metrics. A metric may be NaN.

    Returns:
        One row per cell and metric: n, mean, low, high, difference, difference_low, difference_high, p, p_holm, and
        chance, where there is a column `<metric>_chance`.
    """
    out = []
    for (task, protocol), part in rows.groupby(["task", "protocol"], sort=False):
        for metric in metrics:
            if metric not in part or part[metric].isna().all():
                continue
            values, cells = _pivot(part, metric)
            base = _baseline(values, cells)
            plain = mean_intervals(values)
            paired = mean_intervals(values - base)
            frame = cells.assign(
                task=task,
                protocol=protocol,
                metric=metric,
                n=(~np.isnan(values)).sum(0),
                mean=plain.estimate,
                low=plain.low,
                high=plain.high,
                difference=paired.estimate,
                difference_low=paired.low,
                difference_high=paired.high,
                p=np.where(cells["kind"] == "method", mean_p(values - base), np.nan),
            )
            frame["p_holm"] = holm(frame["p"].to_numpy())
            if f"{metric}_chance" in part:
                frame["chance"] = _column_means(_pivot(part, f"{metric}_chance")[0])
            own = frame["policy"] == BASELINE
            frame.loc[own, ["difference", "difference_low", "difference_high"]] = np.nan
            out.append(frame)
    names = ["task", "protocol", "kind", "policy", "budget", "metric"]
    found = pd.concat(out, ignore_index=True)
    return found[[*names, *(c for c in found.columns if c not in names)]]


def gaps(rows: pd.DataFrame, metric: str, best: str | None, *, upper: str | None = None) -> pd.DataFrame:
    """Regret and share of the gap between protected random and a bound that a policy closes, by cell.

    Utilities are pooled over prompts before they are divided: a mean of quotients is ruled by prompts without a gap.

    Args:
        best: label of the policy that is the bound, at the same budget.
        upper: or the column of `rows` that holds the bound of each request.
    """
    out = []
    for (task, protocol), part in rows.groupby(["task", "protocol"], sort=False):
        values, cells = _pivot(part, metric)
        base = _baseline(values, cells)
        bound = _pivot(part, upper)[0] if upper is not None else _of_policy(values, cells, best)
        regret = mean_intervals(bound - values)
        closed = ratio_intervals(values - base, bound - base)
        gap = _column_means(bound - base)
        frame = cells.assign(
            task=task,
            protocol=protocol,
            metric=metric,
            bound=best or "full cache",
            regret=regret.estimate,
            regret_low=regret.low,
            regret_high=regret.high,
            gap=gap,
            closed=np.where(gap > 0, closed.estimate, np.nan),
            closed_low=np.where(gap > 0, closed.low, np.nan),
            closed_high=np.where(gap > 0, closed.high, np.nan),
        )
        out.append(frame[~frame["policy"].isin([BASELINE, best])])
    return pd.concat(out, ignore_index=True)


def protection(rows: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """What the study's always-kept set changes in a method, beside the one that it is published with.

    Args:
        rows: as for `means`.

    Returns:
        task, protocol, policy, budget, metric, n; `equal` and `published`, means over the same prompts; `difference`,
        the former minus the latter, with its interval `difference_low` and `_high`.
    """
    out = []
    for (task, protocol), part in rows[rows["kind"].isin(["method", "published"])].groupby(
        ["task", "protocol"], sort=False
    ):
        for metric in metrics:
            values, cells = _pivot(part, metric)
            at = {tuple(key): i for i, key in enumerate(cells.itertuples(index=False, name=None))}
            pairs = [
                (k, at["method", *k[1:]], i) for k, i in at.items() if k[0] == "published" and ("method", *k[1:]) in at
            ]
            for (_, policy, budget), i, j in pairs:
                both = values[~np.isnan(values[:, [i, j]]).any(1)][:, [i, j]]
                if not len(both):
                    continue
                paired = mean_intervals(both[:, :1] - both[:, 1:])
                named = {"task": task, "protocol": protocol, "policy": policy, "budget": budget, "metric": metric}
                shown = {"n": len(both), "equal": both[:, 0].mean(), "published": both[:, 1].mean()}
                ends = {"difference_low": paired.low[0], "difference_high": paired.high[0]}
                out.append({**named, **shown, "difference": paired.estimate[0], **ends})
    columns = ["task", "protocol", "policy", "budget", "metric", "n", "equal", "published", "difference"]
    return pd.DataFrame(out, columns=[*columns, "difference_low", "difference_high"])


def by_head(heads: pd.DataFrame) -> pd.DataFrame:
    """Non-trivial mass recall of each layer and query head, by cell: sums over prompts and steps."""
    out = heads.assign(recall=heads["held"] / heads["mass"].where(heads["mass"] > 0))
    return out.drop(columns=["held"])


def matrices(rows: pd.DataFrame, metric: str) -> Iterator[tuple[tuple[str, str, str], pd.DataFrame]]:
    """Per (task, protocol, budget): prompts by policies."""
    for key, part in rows.groupby(["task", "protocol", "budget"], sort=False):
        yield key, part.pivot(index="rid", columns="policy", values=metric)


def _pivot(part: pd.DataFrame, metric: str) -> tuple[Array, pd.DataFrame]:
    """Values `[prompts, cells]`, and the cells' kind, policy and budget, in order of listing."""
    wide = part.pivot(index="rid", columns=["kind", "policy", "budget"], values=metric)
    order = part.drop_duplicates(["kind", "policy", "budget"])[["kind", "policy", "budget"]]
    order = order.assign(_rank=order["kind"].map(KINDS.index)).sort_values("_rank", kind="stable")
    cells = order.drop(columns="_rank").reset_index(drop=True)
    return wide[list(cells.itertuples(index=False, name=None))].to_numpy(np.float64), cells


def _column_means(values: Array) -> Array:
    """Means over prompts that have a value; NaN where none has."""
    here = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(here, values, 0.0).sum(0) / here.sum(0))


def _baseline(values: Array, cells: pd.DataFrame) -> Array:
    return _of_policy(values, cells, BASELINE)


def _of_policy(values: Array, cells: pd.DataFrame, policy: str | None) -> Array:
    """The values of one policy under the budget of each cell; NaN where it has none."""
    at = {b: i for i, (p, b) in enumerate(zip(cells["policy"], cells["budget"], strict=True)) if p == policy}
    columns = [values[:, at[b]] if b in at else np.full(len(values), np.nan) for b in cells["budget"]]
    return np.stack(columns, 1)
