"""Effect over floor: how far an arm is from the baseline, beside how far arms are from themselves.

An *effect* compares a run of an arm with the run of the baseline in the same replicate, which served the requests in
the same order. A *floor* compares two replicates of one arm. If a policy did not matter, the four runs of two
replicates would be exchangeable, and exchanging the arm's second run with the baseline's first turns effects into
floors: so the difference, effect minus floor, is as likely as its negative in every cluster. That is what the sign-flip
test needs. Clusters are prefix families, because requests of a family share rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.stats.bootstrap import cluster_bootstrap
from sglang_probe.stats.equivalence import within
from sglang_probe.stats.multiple import benjamini_hochberg
from sglang_probe.stats.paired import sign_flips

EFFECT = "effect"
FLOOR = "floor"
MARGIN = 1e-3
"""Relative L2 that an effect may exceed the floor by and still be called equivalent: an eighth of the spacing of
neighbouring bf16 numbers, which is 2**-7."""

LEAST_CLUSTERS = 6
"""With fewer, no interval and no test is worth printing: of 2**5 sign patterns, one is already 3 %."""

CELL = ["hook_point", "phase"]


@dataclass(frozen=True)
class Comparison:
    """Two runs that are compared: an arm's with the baseline's, or two replicates of one arm."""

    kind: str
    arm: str
    a: str
    b: str

    @property
    def label(self) -> str:
        return f"{self.a} vs {self.b}"


def comparisons(arms: dict[str, str], baseline: str) -> list[Comparison]:
    """What is compared with what.

    Args:
        arms: arm of each run, replicates of an arm in order.
        baseline: the arm that all others are compared with.
    """
    runs: dict[str, list[str]] = {}
    for run, arm in arms.items():
        runs.setdefault(arm, []).append(run)
    out = [
        Comparison(EFFECT, arm, a, b)
        for arm, mine in runs.items()
        if arm != baseline
        for a, b in zip(mine, runs[baseline], strict=False)
    ]
    return out + [
        Comparison(FLOOR, arm, a, b) for arm, mine in runs.items() for a, b in zip(mine[1:], mine, strict=False)
    ]


def cell_sums(positions: pd.DataFrame, l2: dict[str, Any], by: Sequence[str]) -> pd.DataFrame:
    """Per hook point, cluster and cell: positions `n`, of them bit-identical `same`, and `sum` of the relative L2.

    Args:
        positions: with the columns `cluster`, `phase` and `by`.
        l2: relative L2 per hook point, aligned with `positions`.
    """
    keys = list(dict.fromkeys(["cluster", "phase", *by]))
    frames = [] if l2 else [pd.DataFrame(columns=[*keys, "n", "same", "sum", "hook_point"])]
    for hook_point, values in l2.items():
        frame = positions[keys].assign(n=1, same=values == 0, sum=values.astype(np.float64))
        sums = frame.groupby(keys, sort=False, observed=True)[["n", "same", "sum"]].sum().reset_index()
        frames.append(sums.assign(hook_point=hook_point))
    return pd.concat(frames, ignore_index=True)


def floor_table(
    sums: pd.DataFrame, baseline: str, *, by: Sequence[str] = (), margin: float = MARGIN, seed: int = 0
) -> pd.DataFrame:
    """Effect beside floor for every arm and cell.

    Args:
        sums: `cell_sums` of every comparison, with its `kind`, `arm` and `comparison`.
        by: what cells are made of, beside hook point and phase.
        margin: see `MARGIN`.

    Returns:
        arm, hook_point, phase, *by, positions, clusters; `identical_effect` and `identical_floor` (the lowest over
        replicates); `effect`, `floor` and `excess` (effect minus floor), means of the relative L2, each with `_low` and
        `_high` of its 95 % cluster bootstrap interval; `floor_of_arm`, the part of the floor that is the arm's own;
        `effect_min` and `effect_max` over replicates; `p` (sign-flip, one-sided) and `q` (Benjamini-Hochberg over the
        table); `verdict`, in which "no test" means too few clusters.
    """
    keys = [*CELL, *by]
    rows = []
    for arm in [a for a in dict.fromkeys(sums["arm"]) if a != baseline]:
        effects = sums[(sums["kind"] == EFFECT) & (sums["arm"] == arm)]
        floors = sums[(sums["kind"] == FLOOR) & sums["arm"].isin([arm, baseline])]
        cells = dict(list(floors.groupby(keys, observed=True)))
        for key, effect in effects.groupby(keys, sort=False, observed=True):
            floor = cells.get(key)
            own = float("nan") if floor is None else _mean(floor[floor["arm"] == arm])
            cell = {**_cell(effect, floor, seed), "floor_of_arm": own}
            rows.append({"arm": arm, **dict(zip(keys, key, strict=True)), **cell})
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    table["q"] = benjamini_hochberg(table["p"].to_numpy())
    table["verdict"] = [_verdict(r, margin) for r in table.to_dict("records")]
    return table


def _cell(effect: pd.DataFrame, floor: pd.DataFrame | None, seed: int) -> dict[str, Any]:
    by_run = effect.groupby("comparison", sort=False)[["n", "same", "sum"]].sum()
    means = by_run["sum"] / by_run["n"]
    effects = effect.groupby("cluster", observed=True)[["sum", "n"]].sum()
    out: dict[str, Any] = {
        "positions": int(by_run["n"].max()),
        "clusters": len(effects),
        "identical_effect": float((by_run["same"] / by_run["n"]).min()),
        "identical_floor": float("nan"),
        "effect": float(by_run["sum"].sum() / by_run["n"].sum()),
        "floor": float("nan"),
        "excess": float("nan"),
        "effect_min": float(means.min()),
        "effect_max": float(means.max()),
        "p": float("nan"),
    }
    for name in ("effect", "floor", "excess"):
        out[f"{name}_low"] = out[f"{name}_high"] = float("nan")
    if floor is None:
        return out
    by_floor = floor.groupby("comparison", sort=False)[["n", "same", "sum"]].sum()
    out["identical_floor"] = float((by_floor["same"] / by_floor["n"]).min())
    out["floor"] = float(by_floor["sum"].sum() / by_floor["n"].sum())
    out["excess"] = out["effect"] - out["floor"]
    both = effects.join(floor.groupby("cluster", observed=True)[["sum", "n"]].sum(), rsuffix="_floor", how="inner")
    out["clusters"] = len(both)
    if len(both) < LEAST_CLUSTERS or out["identical_effect"] == out["identical_floor"] == 1:
        return out
    values = both[["sum", "n", "sum_floor", "n_floor"]].to_numpy(np.float64)
    interval = cluster_bootstrap(values, _means, seed=seed)
    for i, name in enumerate(("effect", "floor", "excess")):
        out[f"{name}_low"], out[f"{name}_high"] = float(interval.low[i]), float(interval.high[i])
    differences = values[:, 0] / values[:, 1] - values[:, 2] / values[:, 3]
    out["p"] = float(sign_flips(differences[:, None], alternative="greater", seed=seed)[0])
    return out


def _mean(sums: pd.DataFrame) -> float:
    return float(sums["sum"].sum() / sums["n"].sum()) if len(sums) else float("nan")


def _means(sums: Any) -> Any:
    """Effect, floor and their difference, from `[..., 4]` sums to `[..., 3]`."""
    effect, floor = sums[..., 0] / sums[..., 1], sums[..., 2] / sums[..., 3]
    return np.stack([effect, floor, effect - floor], axis=-1)


def _verdict(r: dict[str, Any], margin: float) -> str:
    if r["identical_effect"] == 1:
        return "bit-identical"
    if np.isnan(r["floor"]):
        return "no floor: run replicates"
    if np.isnan(r["excess_low"]):
        side = "not above" if r["excess"] <= 0 else "above"
        return f"{side} the floor; no test"
    if r["excess_high"] <= 0:
        return "below the floor"
    if r["excess_low"] > 0 and r["q"] <= 0.05:
        small = within(r["excess_low"], r["excess_high"], margin) == "equivalent"
        return f"above the floor, by less than {margin:g}" if small else "above the floor"
    if within(r["excess_low"], r["excess_high"], margin) == "equivalent":
        return f"equivalent within {margin:g}"
    return "unresolved"
