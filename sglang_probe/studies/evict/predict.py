"""Which offline metric predicts what eviction does in the engine: do policies rank alike by both?

Within a task, budget and protocol, policies are ranked by the metric and by the outcome, and Spearman's correlations
are averaged. Oracles and everything else that reads the future are left out: they are ranked by what defines them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.stats.agreement import mean_spearman, without_each
from sglang_probe.stats.intervals import jackknife_interval
from sglang_probe.studies.evict.judge import BETTER_LOW
from sglang_probe.studies.evict.summary import matrices

LEAST_POLICIES = 4
Key = tuple[str, str, str]
"""Task, protocol and budget."""


def predictors(offline: pd.DataFrame, outcomes: pd.DataFrame, metrics: Sequence[str], outcome: str) -> pd.DataFrame:
    """Spearman of each metric with the outcome over methods and baseline, `by` task, protocol, budget, and over all.

    Metrics that are better when low enter with their sign turned, so that a good predictor is always positive.
    Intervals are over policies (`sglang_probe.stats.agreement`).

    Args:
        offline, outcomes: rows per cell and request, with the columns of `offline.CELL` and `rid`.

    Returns:
        by, task, protocol, budget, metric, outcome, cells, policies, spearman, low, high; `below_best`, how much lower
        than the metric of the highest correlation, with its interval `below_best_low` and `_high`. Where that holds 0
        the two are not told apart.
    """
    points = _points(offline, outcomes, metrics, outcome)
    names = sorted({p for cells in points.values() for x, _ in cells.values() for p in x.index})
    correlated = {m: {k: without_each(*_aligned(c, names)) for k, c in cells.items()} for m, cells in points.items()}
    out = []
    for by, chosen in _selections(list(dict.fromkeys(key for found in points.values() for key in found))):
        mine = {m: [k for k in chosen if k in cells] for m, cells in points.items()}
        found = {m: mean_spearman([correlated[m][k] for k in keys]) for m, keys in mine.items() if keys}
        best = max(found, key=lambda m: np.nan_to_num(found[m][0], nan=-2.0))
        for metric, (estimate, without) in found.items():
            own = jackknife_interval(np.asarray(estimate), without, bounds=(-1.0, 1.0))
            with np.errstate(invalid="ignore"):
                apart = found[best][1] - without
            apart = np.where(np.isnan(apart), np.inf, apart)  # neither has a value without this policy
            below = jackknife_interval(np.asarray(found[best][0] - estimate), apart)
            out.append(
                {
                    **dict(zip(("task", "protocol", "budget"), by, strict=True)),
                    "metric": metric,
                    "outcome": outcome,
                    "cells": len(mine[metric]),
                    "policies": max(len(points[metric][k][0]) for k in mine[metric]),
                    "spearman": estimate,
                    "low": float(own.low),
                    "high": float(own.high),
                    "below_best": float(below.estimate),
                    "below_best_low": float(below.low),
                    "below_best_high": float(below.high),
                }
            )
    columns = ["task", "protocol", "budget", "metric", "outcome", "cells", "policies", "spearman", "low", "high"]
    return pd.DataFrame(out, columns=[*columns, "below_best", "below_best_low", "below_best_high"])


def _points(
    offline: pd.DataFrame, outcomes: pd.DataFrame, metrics: Sequence[str], outcome: str
) -> dict[str, dict[Key, tuple[pd.Series, pd.Series]]]:
    """By metric and cell: means over prompts of the metric and of the outcome, by policy."""
    kinds = ("method", "baseline")
    cells = dict(matrices(outcomes[outcomes["kind"].isin(kinds)], outcome))
    points: dict[str, dict[Key, tuple[pd.Series, pd.Series]]] = {}
    for metric in metrics:
        sign = -1.0 if metric in BETTER_LOW else 1.0
        for key, found in matrices(offline[offline["kind"].isin(kinds)], metric):
            if key not in cells:
                continue
            x, y = found.dropna(axis=1).align(cells[key].dropna(axis=1), join="inner")
            if x.shape[1] >= LEAST_POLICIES and len(x):
                points.setdefault(metric, {})[key] = (sign * x.mean(), y.mean())
    return points


def _aligned(cell: tuple[pd.Series, pd.Series], names: list[str]) -> tuple[Any, Any]:
    x, y = (side.reindex(names).to_numpy(np.float64) for side in cell)
    return x, y


ALL = "all"


def _selections(
    keys: list[tuple[str, str, str]],
) -> list[tuple[tuple[str, str, str], list[tuple[str, str, str]]]]:
    """All cells, those of each task, of each task and protocol, and each cell alone."""
    if not keys:
        return []
    tasks = dict.fromkeys((k[0], ALL, ALL) for k in keys)
    halves = dict.fromkeys((*k[:2], ALL) for k in keys)
    wanted = [(ALL, ALL, ALL), *tasks, *halves, *keys]
    return [(w, [k for k in keys if all(x in (ALL, y) for x, y in zip(w, k, strict=True))]) for w in wanted]
