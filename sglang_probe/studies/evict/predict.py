"""Which offline metric predicts what eviction does in the engine: do policies rank alike by both?

Within a task, budget and protocol, policies are ranked by the metric and by the outcome, and Spearman's correlations
are averaged. Oracles and everything else that reads the future are left out: they are ranked by what defines them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sglang_probe.stats.agreement import mean_spearman
from sglang_probe.studies.evict.judge import BETTER_LOW
from sglang_probe.studies.evict.summary import matrices

LEAST_POLICIES = 4


def predictors(
    offline: pd.DataFrame,
    outcomes: pd.DataFrame,
    metrics: Sequence[str],
    outcome: str,
    *,
    resamples: int,
    seed: int = 0,
) -> pd.DataFrame:
    """Spearman of each metric with the outcome over methods and baseline, `by` task, protocol, budget, and over all.

    Metrics that are better when low enter with their sign turned, so that a good predictor is always positive.

    Args:
        offline, outcomes: rows per cell and request, with the columns of `offline.CELL` and `rid`.

    Returns:
        by, task, protocol, budget, metric, outcome, cells, policies, spearman, low, high.
    """
    kinds = ("method", "baseline")
    cells = dict(matrices(outcomes[outcomes["kind"].isin(kinds)], outcome))
    tasks = {t: i for i, t in enumerate(dict.fromkeys(offline["task"]))}
    out = []
    for metric in metrics:
        sign = -1.0 if metric in BETTER_LOW else 1.0
        pairs = {}
        for key, found in matrices(offline[offline["kind"].isin(kinds)], metric):
            if key not in cells:
                continue
            x, y = found.dropna(axis=1).align(cells[key].dropna(axis=1), join="inner")
            if x.shape[1] >= LEAST_POLICIES and len(x):
                pairs[key] = (sign * x.to_numpy(np.float64).T, y.to_numpy(np.float64).T)
        for by, chosen in _selections(list(pairs)):
            named = dict(zip(("task", "protocol", "budget"), by, strict=True))
            interval = mean_spearman([pairs[k] for k in chosen], [tasks[k[0]] for k in chosen], resamples=resamples)
            policies = max(len(pairs[k][0]) for k in chosen)
            out.append(
                {
                    **named,
                    "metric": metric,
                    "outcome": outcome,
                    "cells": len(chosen),
                    "policies": policies,
                    "spearman": float(interval.estimate),
                    "low": float(interval.low),
                    "high": float(interval.high),
                }
            )
    columns = ["task", "protocol", "budget", "metric", "outcome", "cells", "policies", "spearman", "low", "high"]
    return pd.DataFrame(out, columns=columns)


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
