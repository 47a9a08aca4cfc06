"""What a share of the model's own text does to a dictionary: reconstruction of either kind of row, and its identity.

All dictionaries see the same requests and positions in the same order, with the same initialisations; what differs is
whether the row at a position is of human text or of the model's own, decoded or prefilled again (the control: content
without phase, and cheaper).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.run.run import Run
from sglang_probe.sae.evaluation import evaluate, variance_of
from sglang_probe.sae.manifest import facts_of_run
from sglang_probe.sae.match import compare
from sglang_probe.sae.sae import SAE
from sglang_probe.stats.intervals import mean_intervals
from sglang_probe.studies.base import Tell
from sglang_probe.studies.lessons import curves, read_lessons
from sglang_probe.studies.phase.study import DECODED, HUMAN
from sglang_probe.studies.sae_hybrid.config import SaeHybridConfig
from sglang_probe.studies.sae_hybrid.runs import ARMS, Rows, read_rows, wanted
from sglang_probe.verify.check import Check, all_hold
from sglang_probe.verify.verify import verify

Array = np.ndarray[Any, Any]
Errors = Mapping[tuple[str, float, int], Mapping[str, Array]]
"""Squared error of each held-out row by dictionary (source, share, seed) and arm."""


@dataclass(frozen=True)
class HybridResult:
    """What was found."""

    name: str
    of: Mapping[str, Any]
    checks: Mapping[str, Sequence[Check]]
    fvu: pd.DataFrame
    """By `source`, `share` and `arm` of held-out rows: `fvu` (of the variance of human rows), mean over seeds, and
    `more` than of human text alone, paired by family, with interval."""
    gaps: pd.DataFrame
    """By `source` and `share`: `gap` (FVU of decoded rows minus that of human ones) with interval."""
    matches: pd.DataFrame
    """By `source` and `share`: `seeds` (distance between seeds), `moved` (distance to the dictionary of human text
    with the same seed and batches), both with `*_chance`."""
    curve: pd.DataFrame

    @property
    def ok(self) -> bool:
        """Every invariant of every run holds."""
        return all_hold(self.checks)

    def to_json(self) -> dict[str, Any]:
        """All but the learning curves."""
        tables = {n: getattr(self, n).to_dict("records") for n in ("fvu", "gaps", "matches")}
        return {"name": self.name, "of": dict(self.of), **tables}

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """All of it."""
        return {n: getattr(self, n) for n in ("fvu", "gaps", "matches", "curve")}


def study_hybrid(
    runs: Mapping[str, Run], config: SaeHybridConfig, folder: Path, name: str, tell: Tell = lambda _: None
) -> HybridResult:
    """Judge the dictionaries of a study.

    Raises:
        RunDirectoryError: a dictionary is missing.
    """
    names = wanted(config)
    saes = read_lessons(folder, [n for n, *_ in names])
    by = {(source, share, seed): saes[n] for n, source, share, seed in names}
    tell("reading rows")
    rows = read_rows(config, runs)
    errors, alive = {}, {}
    for key, sae in by.items():
        tell(f"judging {key[0]} {key[1]:g}, seed {key[2]}")
        errors[key], alive[key] = _judged(sae, rows)
    checks = {}
    for run_name, run in runs.items():
        tell(f"verifying {run_name}")
        checks[run_name] = verify(run)
    variance = variance_of([_held_out(rows, HUMAN)])
    families = rows.held_out_keys["family"].to_numpy()
    tell("matching")
    model = runs[HUMAN].manifest["model"]
    sampling = runs[DECODED].manifest.get("sampling") or {}
    of = {
        "model": {k: model.get(k) for k in ("name", "architecture", "layers")},
        "config": {**config.trained(), "shares": config.shares, "sampling": sampling},
        "runs": {n: facts_of_run(r)["manifest_sha256"] for n, r in runs.items()},
        "keys": len(rows.keys),
        "rows_held_out": len(rows.held_out_keys),
        "families_held_out": len(set(families)),
        "repeated_8_grams": dict(rows.repeated),
        "left_out": dict(rows.left_out),
    }
    return HybridResult(
        name,
        of,
        checks,
        reconstruction(errors, families, variance, config.seeds),
        gaps(errors, families, variance, config.seeds),
        identities(by, alive, config.seeds),
        pd.DataFrame(curves(folder, [n for n, *_ in names])),
    )


def reconstruction(errors: Errors, family_N: Array, variance: float, seeds: Sequence[int]) -> pd.DataFrame:
    """FVU by dictionary and arm, and how much more it is than the dictionary's of human text."""
    found = []
    for source, share in dict.fromkeys((source, share) for source, share, _ in errors):
        for arm in ARMS:
            mine, base = (_mean(errors, k, arm, seeds) / variance for k in ((source, share), (HUMAN, 0.0)))
            more = mean_intervals(_by_family(mine - base, family_N))
            ends = {"more": more.estimate, "more_low": more.low, "more_high": more.high}
            row = {"source": source, "share": share, "arm": arm, "fvu": float(mine.mean())}
            found.append({**row, **{k: float(v[0]) for k, v in ends.items()}})
    return pd.DataFrame(found)


def gaps(errors: Errors, family_N: Array, variance: float, seeds: Sequence[int]) -> pd.DataFrame:
    """FVU of decoded rows minus that of human rows at the same positions, by dictionary."""
    found = []
    for source, share in dict.fromkeys((source, share) for source, share, _ in errors):
        apart = [_mean(errors, (source, share), arm, seeds) / variance for arm in (DECODED, HUMAN)]
        gap = mean_intervals(_by_family(apart[0] - apart[1], family_N))
        ends = {"gap": gap.estimate, "gap_low": gap.low, "gap_high": gap.high}
        found.append({"source": source, "share": share, **{k: float(v[0]) for k, v in ends.items()}})
    return pd.DataFrame(found)


def identities(
    saes: Mapping[tuple[str, float, int], SAE], alive: Mapping[tuple[str, float, int], Array], seeds: Sequence[int]
) -> pd.DataFrame:
    """How alike two seeds of one mixture are, and a mixture and human text with one seed."""

    def distance(a: tuple[str, float, int], b: tuple[str, float, int]) -> tuple[float, float]:
        found = compare(saes[a], saes[b], alive[a], alive[b])
        return 1 - found["mcc"], 1 - found["mcc_chance"]

    rows = []
    for source, share in dict.fromkeys((source, share) for source, share, _ in saes):
        between = [distance((source, share, a), (source, share, b)) for a, b in combinations(seeds, 2)]
        moved = [distance((HUMAN, 0.0, s), (source, share, s)) for s in seeds] if share else [(0.0, float("nan"))]
        row: dict[str, Any] = {"source": source, "share": share}
        for name, values in (("seeds", between), ("moved", moved)):
            row |= {
                name: float(np.mean([d for d, _ in values])),
                f"{name}_chance": float(np.mean([c for _, c in values])),
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _judged(sae: SAE, rows: Rows) -> tuple[dict[str, Array], Array]:
    found = {arm: evaluate(sae, _held_out(rows, arm)) for arm in ARMS}
    fires = np.logical_or.reduce([e.fired > 0 for e in found.values()])
    return {arm: e.rows["error"].to_numpy() for arm, e in found.items()}, fires


def _held_out(rows: Rows, arm: str) -> Any:
    return rows.held_out[arm].rows(np.arange(len(rows.held_out_keys)))


def _mean(errors: Errors, key: tuple[str, float], arm: str, seeds: Sequence[int]) -> Array:
    return np.asarray(np.mean([errors[(*key, s)][arm] for s in seeds], axis=0))


def _by_family(values_N: Array, family_N: Array) -> Array:
    return pd.Series(values_N).groupby(family_N).mean().to_numpy()[:, None]
