"""What the coverage study finds: frames and totals, made from the counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.run import schema
from sglang_probe.run.columns import FATES
from sglang_probe.studies.coverage.bias import Bias, bias_of
from sglang_probe.studies.coverage.reuse import COMPUTED
from sglang_probe.studies.coverage.tally import BINS, FIRST, NEVER, Tally

Array = np.ndarray[Any, Any]

MULTIPLICITIES = ["1", "2", *(f"{(1 << i) + 1:,}–{1 << (i + 1):,}" for i in range(1, BINS - 1))]


@dataclass(frozen=True)
class Map:
    """Coverage along one axis, or two crossed."""

    axes: tuple[str, ...]
    classes: pd.DataFrame
    """One row per class that occurs; columns: one per axis; positions (occurrences in traffic), computed, reused,
    dropped, unrequested; coverage (computed share); contexts (unique), contexts_in_run, context_coverage;
    traffic_share, harvest_share, log2_ratio (of the shares) with its interval low and high; weight (occurrences that
    a computed position of the class stands for)."""
    multiplicity: pd.DataFrame
    """One row per class and bin: the axes, multiplicity (occurrences in traffic that one computed position stands for),
    rows (computed positions)."""
    bias: Bias

    @property
    def name(self) -> str:
        return " x ".join(self.axes)


@dataclass(frozen=True)
class Coverage:
    """The study of one run."""

    run: str
    totals: dict[str, float]
    """positions, requests, computed, reused, dropped, unrequested, coverage, contexts, contexts_in_run,
    context_coverage, effective_rows (of the computed positions, each weighted by the occurrences it stands for),
    families."""
    maps: list[Map]
    notes: list[str] = field(default_factory=list)
    families: str = ""
    missing_axes: dict[str, str] = field(default_factory=dict)
    """Axes that could not be used on this run, and why."""

    def map(self, name: str) -> Map:
        """The map of an axis, or of two crossed (`position x segment`)."""
        return next(m for m in self.maps if m.name == name)


def name_apart(studies: Sequence[Coverage]) -> list[Coverage]:
    """The studies with names that differ: a run whose name another has gets a number."""
    names = [c.run for c in studies]
    return [replace(c, run=f"{c.run}-{i + 1}") if names.count(c.run) > 1 else c for i, c in enumerate(studies)]


def totals_of(whole: Tally, moments: Array, requests: int, families: int, *, known: bool) -> dict[str, float]:
    fates = whole.by_fate()
    contexts = whole.by_context()
    unique = float(contexts[FIRST] + contexts[NEVER]) if known else float("nan")
    in_run = float(contexts[FIRST]) if known else float("nan")
    positions = int(fates.sum())
    return {
        "requests": requests,
        "families": families,
        "positions": positions,
        **{name: int(fates[i]) for i, name in enumerate(FATES)},
        "coverage": _share(fates[COMPUTED], positions),
        "contexts": unique,
        "contexts_in_run": in_run,
        "context_coverage": in_run / unique if known and unique else float("nan"),
        "effective_rows": float(moments[0] ** 2 / moments[1]) if moments[1] else 0.0,
    }


def map_of(tally: Tally, *, known: bool) -> Map:
    fates, contexts = tally.by_fate(), tally.by_context()
    present = np.argwhere(fates.sum(axis=-1) > 0)
    at = tuple(present.T)
    names = {
        axis.name: pd.Categorical.from_codes(present[:, i], categories=axis.classes)
        for i, axis in enumerate(tally.axes)
    }
    cell = np.ravel_multi_index(at, fates.shape[:-1])
    positions, computed = (a[:, cell] for a in tally.per_group())
    bias = bias_of(positions, computed)
    frame = pd.DataFrame(names)
    frame["positions"] = positions.sum(axis=0)
    for i, name in enumerate(FATES):
        frame[name] = fates[(*at, i)]
    frame["coverage"] = frame[schema.COMPUTED] / frame["positions"]
    first, never = contexts[(*at, FIRST)], contexts[(*at, NEVER)]
    unique = np.where(known, first + never, np.nan)
    frame["contexts"] = pd.array(unique, dtype="Int64") if known else np.nan
    frame["contexts_in_run"] = pd.array(first, dtype="Int64") if known else np.nan
    with np.errstate(invalid="ignore", divide="ignore"):
        frame["context_coverage"] = np.where(unique > 0, first / unique, np.nan)
    for name in ("traffic_share", "harvest_share", "log2_ratio", "low", "high", "weight"):
        frame[name] = getattr(bias, name)
    counts = tally.multiplicity[at]
    which, bins = np.nonzero(counts)
    spread = {n: c[which] for n, c in names.items()}
    multiplicity = pd.DataFrame(
        {
            **spread,
            "multiplicity": pd.Categorical.from_codes(bins, categories=MULTIPLICITIES),
            "rows": counts[which, bins],
        }
    )
    return Map(tuple(a.name for a in tally.axes), frame, multiplicity, bias)


def _share(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else float("nan")
