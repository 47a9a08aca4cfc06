"""Effect over floor: how far an arm is from the baseline, beside how far arms are from themselves.

Both are taken across the same change of order. An *effect* compares a run of the arm with a run of the baseline that
served the requests in another order; a *floor* compares two runs of one arm, in the same two orders. If the policy did
nothing, the runs of one order could exchange their labels, and that turns effects into floors: so effect minus floor is
as likely as its negative, whatever the order does (`sglang_probe.stats.relabelling`). Effect and floor are over the
same positions, those that every run of both arms computed, and clusters are prefix families, because requests of a
family share rows.

Beside them stands the distance *in the same order*. On an engine that is deterministic given its batches it is the
sharper measure: nothing but the policy differs. It has no floor, because an arm has one run in each order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.stats.equivalence import within
from sglang_probe.stats.intervals import LEAST_CLUSTERS, cluster_interval
from sglang_probe.stats.multiple import benjamini_hochberg
from sglang_probe.stats.relabelling import relabelling_p

EFFECT = "effect"
FLOOR = "floor"
SAME_ORDER = "same order"
MARGIN = 1e-3
"""Relative L2 that an effect may exceed the floor by and still be called equivalent: an eighth of the spacing of
neighbouring bf16 numbers, which is 2**-7."""

NO_TEST = "too few families to test"
ALARM = "alarm: the floor exceeds the effect"
"""Cannot be, if the arms are runs of the same requests: something else than policy and order differs between them."""

CELL = ["hook_point", "phase"]
_SUMS = ("n", "same", "sum")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Comparison:
    """Two runs that are compared, `b` being the reference: of an arm and the baseline, or of one arm."""

    kind: str
    arm: str
    """Whose run `a` is, or of a floor whose both are; the arm that is not the baseline, where they differ."""
    beside: str
    """The arm whose effect this belongs to."""
    a: str
    b: str
    orders: tuple[int, int]
    """Replicates of the two runs."""

    @property
    def columns(self) -> dict[str, str]:
        """What `floor_table` asks of the sums of a comparison beside the sums."""
        what = {"kind": self.kind, "arm": self.arm, "comparison": self.label, "beside": self.beside}
        return what | {"orders": f"{self.orders[0]},{self.orders[1]}"}

    @property
    def label(self) -> str:
        return f"{self.a} vs {self.b}"


def comparisons(arms: dict[str, str], baseline: str) -> list[Comparison]:
    """What is compared with what, arm by arm.

    Args:
        arms: arm of each run, replicates of an arm in order; the r-th of every arm served the requests in the same
            order.
        baseline: the arm that all others are compared with.
    """
    runs: dict[str, list[str]] = {}
    for run, arm in arms.items():
        runs.setdefault(arm, []).append(run)
    base = runs[baseline]
    out = []
    for arm, mine in runs.items():
        if arm == baseline:
            continue
        both = min(len(mine), len(base))
        out += [Comparison(SAME_ORDER, arm, arm, mine[i], base[i], (i, i)) for i in range(both)]
        for i, j in combinations(range(both), 2):
            # The run of the later order is the reference in all four: exchanging labels must change nothing else.
            out.append(Comparison(EFFECT, arm, arm, mine[i], base[j], (i, j)))
            out.append(Comparison(EFFECT, arm, arm, base[i], mine[j], (i, j)))
            out.append(Comparison(FLOOR, arm, arm, mine[i], mine[j], (i, j)))
            out.append(Comparison(FLOOR, baseline, arm, base[i], base[j], (i, j)))
    return out


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
        frames.append(sums.astype({k: "str" for k in keys if k in ("phase", "segment")}).assign(hook_point=hook_point))
    return pd.concat(frames, ignore_index=True)


def floor_table(
    sums: pd.DataFrame, baseline: str, *, by: Sequence[str] = (), margin: float = MARGIN, seed: int = 0
) -> pd.DataFrame:
    """Effect beside floor for every arm and cell.

    Args:
        sums: `cell_sums` of every comparison, over the same positions in all comparisons of an arm, with its `kind`,
            `arm`, `comparison`, `beside` and `orders` (text; only needed with more than two replicates).
        by: what cells are made of, beside hook point and phase.
        margin: see `MARGIN`.

    Returns:
        arm, hook_point, phase, *by, positions, clusters; `identical_effect`, `identical_floor` and
        `identical_same_order` (the lowest over comparisons); `effect`, `floor` and `excess` (effect minus floor), means
        of the relative L2, each with `_low` and `_high` of its 95 % interval over clusters; `same_order`, the mean of
        runs in the same order; `floor_of_arm`, the part of the floor that is the arm's own; `effect_min` and
        `effect_max` over comparisons; `p` (exchange of labels, one-sided) and `q` (Benjamini-Hochberg over the table);
        `verdict`. With one replicate there is no effect but `same_order`, and no floor.
    """
    keys = [*CELL, *by]
    sums = sums.assign(**{c: default for c, default in (("beside", None), ("orders", "")) if c not in sums})
    rows, alarms = [], []
    for arm in [a for a in dict.fromkeys(sums["arm"]) if a != baseline]:
        here = sums["beside"].isna() | (sums["beside"] == arm)
        mine = sums[here & sums["arm"].isin([arm, baseline])]
        parts = {
            kind: dict(list(part.groupby(keys, sort=False, observed=True)))
            for kind, part in mine[(mine["kind"] == FLOOR) | (mine["arm"] == arm)].groupby("kind")
        }
        clusters = pd.Index(mine["cluster"].unique())
        for key in parts.get(EFFECT) or parts.get(SAME_ORDER, {}):
            kinds = (EFFECT, FLOOR, SAME_ORDER)
            effect, floor, same = (_part(parts.get(kind, {}).get(key), clusters) for kind in kinds)
            cell, alarm = _cell(effect, floor, same, arm, seed)
            rows.append({"arm": arm, **dict(zip(keys, key, strict=True)), **cell})
            alarms.append(alarm)
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    table["q"] = benjamini_hochberg(table["p"].to_numpy())
    raised = benjamini_hochberg(np.array(alarms)) <= 0.05
    table["verdict"] = [_verdict(r, margin, a) for r, a in zip(table.to_dict("records"), raised, strict=True)]
    return table


@dataclass(frozen=True)
class _Part:
    """The comparisons of one kind in one cell: sums `[comparisons, clusters]`."""

    n: Array
    same: Array
    total: Array
    arms: list[str]
    """Whose, by comparison."""
    orders: list[str]

    @property
    def identical(self) -> float:
        """The lowest share of bit-identical positions of a comparison."""
        return float((self.same.sum(1) / self.n.sum(1)).min())

    @property
    def mean(self) -> float:
        """Mean of the relative L2 over all comparisons."""
        return float(self.total.sum() / self.n.sum())

    def of(self, arm: str) -> float:
        """The mean over the comparisons of one arm."""
        mine = np.array([a == arm for a in self.arms])
        return float(self.total[mine].sum() / self.n[mine].sum()) if mine.any() else float("nan")


def _part(frame: pd.DataFrame | None, clusters: pd.Index) -> _Part | None:
    if frame is None or frame.empty:
        return None
    which, names = pd.factorize(frame["comparison"])
    at = which * len(clusters) + clusters.get_indexer(pd.Index(frame["cluster"]))
    shape = (len(names), len(clusters))
    size = shape[0] * shape[1]
    n, same, total = (np.bincount(at, frame[c].to_numpy(np.float64), size).reshape(shape) for c in _SUMS)
    first = np.unique(which, return_index=True)[1]
    arms, orders = (list(frame[c].iloc[first]) for c in ("arm", "orders"))
    return _Part(n, same, total, arms, orders)


def _cell(
    effect: _Part | None, floor: _Part | None, same_order: _Part | None, arm: str, seed: int
) -> tuple[dict[str, Any], float]:
    """One row of the table, and the p-value of the alarm."""
    shown = effect or same_order
    assert shown is not None
    means = shown.total.sum(1) / shown.n.sum(1)
    out: dict[str, Any] = {
        "positions": int(shown.n.sum(1).max()),
        "clusters": int((shown.n.sum(0) > 0).sum()),
        "identical_effect": shown.identical,
        "identical_floor": floor.identical if floor else float("nan"),
        "identical_same_order": same_order.identical if same_order else float("nan"),
        "effect": shown.mean,
        "floor": floor.mean if floor else float("nan"),
        "same_order": same_order.mean if same_order else float("nan"),
        "excess": float("nan"),
        "effect_min": float(means.min()),
        "effect_max": float(means.max()),
        "floor_of_arm": floor.of(arm) if floor else float("nan"),
        "p": float("nan"),
    }
    for name in ("effect", "floor", "excess"):
        out[f"{name}_low"] = out[f"{name}_high"] = float("nan")
    if floor is None or effect is None:
        return out, float("nan")
    out["excess"] = out["effect"] - out["floor"]
    both = (effect.n.sum(0) > 0) & (floor.n.sum(0) > 0)
    out["clusters"] = int(both.sum())
    if out["clusters"] < LEAST_CLUSTERS or out["identical_effect"] == out["identical_floor"] == 1:
        return out, float("nan")
    sums = np.stack([effect.total.sum(0), effect.n.sum(0), floor.total.sum(0), floor.n.sum(0)], 1)[both]
    found = cluster_interval(sums, _means)
    for i, name in enumerate(("effect", "floor", "excess")):
        out[f"{name}_low"], out[f"{name}_high"] = float(found.low[i]), float(found.high[i])
    differences, pairs = _differences(effect, floor)
    out["p"], alarm = (
        relabelling_p(differences[both], pairs, alternative=side, seed=seed)  # type: ignore[arg-type]
        for side in ("greater", "less")
    )
    return out, alarm


def _differences(effect: _Part, floor: _Part) -> tuple[Array, list[tuple[int, int]]]:
    """What effect and floor of each pair of orders differ by, summed over the positions of a cluster, `[clusters,
    pairs]`; and the orders."""
    columns, pairs = [], []
    for orders in dict.fromkeys(effect.orders):
        mine, beside = (np.array([o == orders for o in part.orders]) for part in (effect, floor))
        if not beside.any():
            continue
        n, below = effect.n[mine].sum(0), floor.n[beside].sum(0)
        scaled = floor.total[beside].sum(0) * np.divide(n, below, out=np.zeros_like(n), where=below > 0)
        columns.append(effect.total[mine].sum(0) - scaled)
        i, _, j = orders.partition(",")
        pairs.append((int(i or 0), int(j or 1)))
    return np.stack(columns, 1), pairs


def _means(sums: Any) -> Any:
    """Effect, floor and their difference, from `[..., 4]` sums to `[..., 3]`."""
    effect, floor = sums[..., 0] / sums[..., 1], sums[..., 2] / sums[..., 3]
    return np.stack([effect, floor, effect - floor], axis=-1)


def _verdict(r: dict[str, Any], margin: float, alarm: bool) -> str:
    if r["identical_effect"] == 1:
        return "bit-identical"
    if np.isnan(r["floor"]):
        return "no floor: run replicates"
    if r["identical_same_order"] == 1:
        return "bit-identical in the same order"
    if r["clusters"] < LEAST_CLUSTERS:
        return f"{'not above' if r['excess'] <= 0 else 'above'} the floor; {NO_TEST}"
    low, high = r["excess_low"], r["excess_high"]
    if np.isnan(low):  # the same excess in every cluster
        low = high = r["excess"]
    if alarm and high < 0:
        return ALARM
    if low > 0 and r["q"] <= 0.05:
        small = within(low, high, margin) == "equivalent"
        return f"above the floor, by less than {margin:g}" if small else "above the floor"
    if within(low, high, margin) == "equivalent":
        return f"equivalent within {margin:g}"
    return "unresolved"
