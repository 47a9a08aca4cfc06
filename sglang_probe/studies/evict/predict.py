"""Which offline metric predicts what eviction does in the engine: do policies rank alike by both?

Within a task, budget and protocol, policies are ranked by the metric and by the outcome, and Spearman's correlations
are averaged. Oracles and everything else that reads the future are left out: they are ranked by what defines them.

Policies and prompts are both drawn. Leave out a policy, and the others are ranked anew; leave out a prompt, and the
means that are ranked change. Intervals are over both (`stats.intervals.crossed_interval`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.stats.agreement import mean_spearman, spearman, without_each
from sglang_probe.stats.intervals import crossed_interval
from sglang_probe.studies.evict.judge import BETTER_LOW
from sglang_probe.studies.evict.summary import matrices

LEAST_POLICIES = 4
Key = tuple[str, str, str]
"""Task, protocol and budget."""
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Correlated:
    """A metric and the outcome in one cell."""

    policies: int
    over_policies: Array
    """Spearman, and the same without each policy of the study, `[1 + policies]`."""
    over_prompts: dict[tuple[str, str], float]
    """Spearman without a prompt, by task and prompt."""


def predictors(offline: pd.DataFrame, outcomes: pd.DataFrame, metrics: Sequence[str], outcome: str) -> pd.DataFrame:
    """Spearman of each metric with the outcome over methods and baseline, `by` task, protocol, budget, and over all.

    Metrics that are better when low enter with their sign turned, so that a good predictor is always positive.

    Args:
        offline, outcomes: rows per cell and request, with the columns of `offline.CELL` and `rid`.

    Returns:
        by, task, protocol, budget, metric, outcome, cells, policies, spearman, low, high; `below_best`, how much lower
        than the metric of the highest correlation, with its interval `below_best_low` and `_high`. Where that holds 0
        the two are not told apart.
    """
    correlated = _correlated(offline, outcomes, metrics, outcome)
    out = []
    for by, chosen in _selections(_keys(correlated)):
        found = _found(correlated, chosen)
        best = max(found, key=lambda m: np.nan_to_num(found[m][0], nan=-2.0))
        for metric, mine in found.items():
            cells = [k for k in chosen if k in correlated[metric]]
            low, high = crossed_interval(*mine, bounds=(-1.0, 1.0))
            below, below_low, below_high = _apart(found[best], mine)
            out.append(
                {
                    **dict(zip(("task", "protocol", "budget"), by, strict=True)),
                    "metric": metric,
                    "outcome": outcome,
                    "cells": len(cells),
                    "policies": max(correlated[metric][k].policies for k in cells),
                    "spearman": mine[0],
                    "low": low,
                    "high": high,
                    "below_best": below,
                    "below_best_low": below_low,
                    "below_best_high": below_high,
                }
            )
    columns = ["task", "protocol", "budget", "metric", "outcome", "cells", "policies", "spearman", "low", "high"]
    return pd.DataFrame(out, columns=[*columns, "below_best", "below_best_low", "below_best_high"])


def predictor_pairs(
    offline: pd.DataFrame, outcomes: pd.DataFrame, metrics: Sequence[str], outcome: str
) -> pd.DataFrame:
    """Which of two metrics predicts better, over all cells: paired, over the same policies and prompts.

    Returns:
        metric (the one with the higher correlation), other, difference, low, high, and `told`, whether the interval
        leaves out 0.
    """
    correlated = _correlated(offline, outcomes, metrics, outcome)
    found = _found(correlated, _keys(correlated))
    order = sorted(found, key=lambda m: -np.nan_to_num(found[m][0], nan=-2.0))
    rows = []
    for metric, other in combinations(order, 2):
        difference, low, high = _apart(found[metric], found[other])
        told = bool(low > 0 or high < 0)
        rows.append(
            {"metric": metric, "other": other, "difference": difference, "low": low, "high": high, "told": told}
        )
    return pd.DataFrame(rows, columns=["metric", "other", "difference", "low", "high", "told"])


Found = tuple[float, Array, Array]
"""A mean over cells, and the same without each policy, and without each prompt."""


def _found(correlated: dict[str, dict[Key, Correlated]], chosen: Sequence[Key]) -> dict[str, Found]:
    prompts = sorted({p for cells in correlated.values() for k in chosen if k in cells for p in cells[k].over_prompts})
    out: dict[str, Found] = {}
    for metric, cells in correlated.items():
        mine = [cells[k] for k in chosen if k in cells]
        if not mine:
            continue
        whole, without_policies = mean_spearman([c.over_policies for c in mine])
        rows = np.array([[c.over_prompts.get(p, c.over_policies[0]) for c in mine] for p in prompts])
        here = ~np.isnan(rows)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = np.where(here, rows, 0.0).sum(1) / here.sum(1)
        out[metric] = whole, without_policies, np.where(np.isnan(means), np.inf, means)
    return out


def _apart(a: Found, b: Found) -> tuple[float, float, float]:
    """How much `a` is above `b`, with its interval."""
    with np.errstate(invalid="ignore"):
        policies, prompts = (np.asarray(x - y) for x, y in zip(a[1:], b[1:], strict=True))
    # Where neither has a value without a policy or a prompt, the comparison needs it.
    policies, prompts = (np.where(np.isnan(x), np.inf, x) for x in (policies, prompts))
    return (a[0] - b[0], *crossed_interval(a[0] - b[0], policies, prompts))


def _keys(correlated: dict[str, dict[Key, Correlated]]) -> list[Key]:
    return list(dict.fromkeys(key for cells in correlated.values() for key in cells))


def _correlated(
    offline: pd.DataFrame, outcomes: pd.DataFrame, metrics: Sequence[str], outcome: str
) -> dict[str, dict[Key, Correlated]]:
    """By metric and cell."""
    kinds = ("method", "baseline")
    cells = dict(matrices(outcomes[outcomes["kind"].isin(kinds)], outcome))
    found: dict[str, dict[Key, tuple[pd.DataFrame, pd.DataFrame]]] = {}
    for metric in metrics:
        sign = -1.0 if metric in BETTER_LOW else 1.0
        for key, values in matrices(offline[offline["kind"].isin(kinds)], metric):
            if key not in cells:
                continue
            x, y = values.dropna(axis=1).align(cells[key].dropna(axis=1), join="inner")
            if x.shape[1] >= LEAST_POLICIES and len(x):
                found.setdefault(metric, {})[key] = (sign * x, y)
    names = sorted({p for cells in found.values() for x, _ in cells.values() for p in x.columns})
    return {m: {k: _of_cell(k[0], x, y, names) for k, (x, y) in cells.items()} for m, cells in found.items()}


def _of_cell(task: str, x: pd.DataFrame, y: pd.DataFrame, names: list[str]) -> Correlated:
    """Args: prompts by policies of the metric and of the outcome."""
    over_policies = without_each(*(side.mean().reindex(names).to_numpy(np.float64) for side in (x, y)))
    n = len(x)
    over_prompts: dict[tuple[str, str], float] = {}
    if n > 1:
        without = [(side.sum().to_numpy() - side.to_numpy()) / (n - 1) for side in (x, y)]
        # The same numbers summed in another order are equal.
        values = spearman(*(np.round(w, 12) for w in without))
        over_prompts = {(task, str(rid)): float(v) for rid, v in zip(x.index, values, strict=True)}
    return Correlated(x.shape[1], over_policies, over_prompts)


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
