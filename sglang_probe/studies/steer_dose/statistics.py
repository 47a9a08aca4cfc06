"""What each dose does, and what arms do at equal side effect. No engine, no model.

An arm is a path of doses from none. Its side effect and its effect at each dose are means over texts, of two kinds that
have nothing in common: neutral texts, and texts that steering is for. **Equal side effect** is the first place on the
path where the side effect reaches a level, by straight lines between doses; an arm that never reaches the level has no
effect there, and nothing is said of it beyond its last dose. Both kinds of texts are drawn, so that an interval is that
of a table with two draws (`stats.intervals.crossed_interval`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ProbeError
from sglang_probe.stats.intervals import LEAST_CLUSTERS, crossed_interval, mean_intervals
from sglang_probe.stats.multiple import holm
from sglang_probe.studies.steer_dose.config import Comparison
from sglang_probe.studies.steer_dose.names import NEUTRAL, TEXT

Array = np.ndarray[Any, Any]
MEASURES = ("kl", "shift", "nll")


@dataclass(frozen=True)
class Path:
    """The doses of an arm: effects of each text, side effects of each neutral text. Column 0 is no dose: zeros."""

    effect_TK: Array
    side_NK: Array


def paths(families: pd.DataFrame) -> dict[str, Path]:
    """The path of each arm.

    Args:
        families: as `per_family` gives; a family that lacks a dose, or has no finite number there, takes no part in any
            arm (`incomplete`).
    """
    families = without(families, incomplete(families))
    found = {}
    for arm, mine in families.groupby("arm", sort=False):
        tables = []
        for scope, name in ((TEXT, "shift"), (NEUTRAL, "kl")):
            wide = mine[mine["scope"] == scope].pivot(index="family", columns="dose", values=name)
            x = wide.sort_index(axis=1).to_numpy(np.float64)
            tables.append(np.concatenate([np.zeros((len(x), 1)), x], axis=1))
        found[str(arm)] = Path(*tables)
    return found


def incomplete(families: pd.DataFrame) -> list[tuple[str, str, str, int]]:
    """Families without a finite number at some dose of some arm: scope, family, and the first such arm and dose."""
    measures = [name for name in MEASURES if name in families]
    finite = np.isfinite(families[measures].to_numpy(np.float64)).all(1)
    found = []
    for scope, mine in families.assign(finite=finite).groupby("scope", sort=False):
        wide = mine.pivot(index="family", columns=["arm", "dose"], values="finite")
        bad = (wide != True).to_numpy()  # noqa: E712
        for i in np.flatnonzero(bad.any(1)):
            arm, dose = wide.columns[int(bad[i].argmax())]
            found.append((str(scope), str(wide.index[i]), str(arm), int(dose)))
    return found


def without(frame: pd.DataFrame, lacking: Sequence[tuple[str, str, str, int]]) -> pd.DataFrame:
    """Rows of a frame with `scope` and `family` that are of none of the families that `incomplete` gave.

    Raises:
        ProbeError: no family of one kind of texts is left; names arm and dose.
    """
    out = {(scope, family) for scope, family, *_ in lacking}
    kept = frame[[key not in out for key in zip(frame["scope"], frame["family"], strict=True)]]
    for scope, _, arm, dose in lacking:
        if not (kept["scope"] == scope).any():
            raise ProbeError(
                f"no family of {'texts' if scope == TEXT else 'neutral texts'} has a finite number at every dose: arm "
                f"`{arm}`, dose {dose} is the first that lacks one",
                fix="lower that dose, or leave the arm out, and record again with --overwrite",
            )
    return kept


def per_family(steps: pd.DataFrame, names: Sequence[str] = MEASURES) -> pd.DataFrame:
    """Means over steps, vectors and texts of each family: `scope, arm, dose, family` and the measures. A step that has
    no number leaves its family without one."""
    keys = ["scope", "arm", "dose", "family"]
    means = steps.groupby(keys, sort=False)[list(names)].mean()
    lacking = steps[list(names)].isna().groupby([steps[k] for k in keys], sort=False).any()
    return means.mask(lacking).reset_index()


def doses(families: pd.DataFrame, by: Sequence[str] = ("scope", "arm", "dose")) -> pd.DataFrame:
    """Mean of every measure over families with its interval: `<by>, families, <m>, <m>_low, <m>_high`."""
    names = [c for c in families.columns if c not in ("family", "scope", "arm", "dose", "what")]
    rows: list[dict[str, Any]] = []
    for key, mine in families.groupby(list(by), sort=False):
        found = mean_intervals(mine[names].to_numpy(np.float64))
        row: dict[str, Any] = dict(zip(by, key, strict=True)) | {"families": len(mine)}
        for j, name in enumerate(names):
            row |= {name: found.estimate[j], f"{name}_low": found.low[j], f"{name}_high": found.high[j]}
        rows.append(row)
    return pd.DataFrame(rows)


def at_level(effect_K: Array, side_K: Array, level: float) -> float:
    """The effect where the side effect first reaches a level, by straight lines between doses; infinite where it never
    does, which an interval takes for "there is none without this text"."""
    reached = np.flatnonzero(side_K >= level)
    if not len(reached):
        return float("inf")
    k = int(reached[0])
    if k == 0:
        return float(effect_K[0])
    share = (level - side_K[k - 1]) / (side_K[k] - side_K[k - 1])
    return float(effect_K[k - 1] + share * (effect_K[k] - effect_K[k - 1]))


def at_levels(found: Mapping[str, Path], levels: Sequence[float]) -> pd.DataFrame:
    """Effect of every arm at every level: `side_effect, arm, effect, low, high`; missing where it is not reached."""
    rows = []
    for level in levels:
        for arm, path in found.items():
            estimate, low, high = _interval({arm: path}, _at(arm, level))
            rows.append((level, arm, estimate, low, high))
    return pd.DataFrame(rows, columns=["side_effect", "arm", "effect", "low", "high"])


def compare(found: Mapping[str, Path], registered: Sequence[Comparison]) -> pd.DataFrame:
    """The registered comparisons: `comparison, side_effect, difference, low, high, p, holm, texts, neutral`.

    The difference is missing where one of the arms does not reach the level. `holm` is adjusted over all that were
    registered: one that cannot be answered counts as not rejected, so that leaving it out gains nothing.
    """
    rows = []
    for c in registered:
        statistic = _difference(c)
        estimate, low, high = _interval(found, statistic)
        path = found[c.arm]
        rows.append(
            {
                "comparison": c.words,
                "side_effect": float(c.at or path.side_NK[:, -1].mean()),
                "difference": estimate,
                "low": low,
                "high": high,
                "p": _p(found, statistic),
                "texts": len(path.effect_TK),
                "neutral": len(path.side_NK),
            }
        )
    frame = pd.DataFrame(rows)
    p = frame["p"].to_numpy(np.float64)
    return frame.assign(holm=np.where(np.isnan(p), np.nan, holm(np.nan_to_num(p, nan=1.0))))


Means = Mapping[str, tuple[Array, Array]]
Statistic = Callable[[Means], float]


def _at(arm: str, level: float) -> Statistic:
    return lambda means: at_level(*means[arm], level)


def _difference(c: Comparison) -> Statistic:
    def statistic(means: Means) -> float:
        effect, side = means[c.arm]
        if c.against is None:
            return float(effect[-1])
        # At its own side effect the arm is where it is, however its path got there.
        mine = float(effect[-1]) if c.at is None else at_level(effect, side, c.at)
        other = at_level(*means[c.against], float(side[-1]) if c.at is None else c.at)
        return mine - other if np.isfinite(mine) and np.isfinite(other) else float("inf")

    return statistic


def _without(found: Mapping[str, Path], statistic: Statistic) -> tuple[float, Array, Array]:
    """The statistic from all texts, from all but each text, and from all but each neutral text."""

    def means(texts: Any, neutral: Any) -> Means:
        return {
            arm: (
                np.delete(path.effect_TK, texts, axis=0).mean(0),
                np.delete(path.side_NK, neutral, axis=0).mean(0),
            )
            for arm, path in found.items()
        }

    lengths = {(len(path.effect_TK), len(path.side_NK)) for path in found.values()}
    if len(lengths) != 1:
        raise ValueError("arms have other texts: what is left out would not be the same")
    n, m = lengths.pop()
    if min(n, m) < 2:
        return statistic(means([], [])), np.empty(0), np.empty(0)
    return (
        statistic(means([], [])),
        np.array([statistic(means([i], [])) for i in range(n)]),
        np.array([statistic(means([], [j])) for j in range(m)]),
    )


def _interval(found: Mapping[str, Path], statistic: Statistic) -> tuple[float, float, float]:
    estimate, texts, neutral = _without(found, statistic)
    if not np.isfinite(estimate):
        return float("nan"), float("nan"), float("nan")
    return (estimate, *crossed_interval(estimate, texts, neutral))


def _p(found: Mapping[str, Path], statistic: Statistic) -> float:
    """Of "it is zero": one less the widest confidence at which the interval leaves zero out, never below what so many
    texts can say by their signs; missing without an interval."""
    estimate, texts, neutral = _without(found, statistic)
    if not np.isfinite(estimate) or not np.isfinite(crossed_interval(estimate, texts, neutral)).all():
        return float("nan")
    included = 2.0 ** (1 - max(LEAST_CLUSTERS, min(len(texts), len(neutral))))
    excluded = 1.0
    for _ in range(40):
        middle = (included * excluded) ** 0.5
        low, high = crossed_interval(estimate, texts, neutral, confidence=1 - middle)
        included, excluded = (middle, excluded) if low <= 0 <= high else (included, middle)
    return excluded
