"""The verdict: what was reused, compared with what was computed anew, beside the difference that reuse has no part in.

**Effect and floor.** Every request was sent twice cold and twice warm, in two orders. The effect of a path pairs cold
of one order with warm of the other; its floor pairs cold with cold and warm with warm across the same two orders, so
that both have the same change of order in them (`docs/explanation/floors-and-intervals.md`). The *yardstick* of a case
is the largest difference between two of its cold requests when only its surroundings changed: alone against in company,
and with more tokens after it. Rounding that depends on the shapes of a forward pass shows there, as it does when a
prefill begins at a border instead of at zero; reuse has no part in it.

**REUSE CHANGES OUTPUTS**: on some path, either greedy flips are more frequent than in the floor, or the mean
|difference of log-probabilities| is larger than floor and yardstick, over cases (`sglang_probe.stats.intervals.mean_p`,
two-sided at 5 %, Holm over all paths and both measures, and the mean is positive). With n cases no such p is below
2**(1 - n): with fewer than `enough` no test could reject, and differences are INCONCLUSIVE.

**WRONG REUSE**: some warm answer `w` of a case differs from *both* of its cold answers by more than rounding can:

    min over k of median over positions |logp_w - logp_cold_k|  >  T,    T = max(FACTOR * Y, LEAST[dtype])

with positions from the border of reuse on (forced tokens of the prompt, then generated ones until they part) and Y the
largest such median among all comparisons of cold with cold: other order, in company, with more tokens after. The median
asks for many positions, so that one near-tie (an expert of a mixture, a rare token) does not raise it; both cold
answers, so that a fault of one cold request does not. `LEAST` is there because a server may be exactly repeatable
(Y = 0) and yet round differently at a border.
The rate of false alarms of a whole gate (10 cases, 6 paths, 2 orders) where rounding is lognormal and `r` times as
large at a border as elsewhere, and the power by the size of what is wrong: `python bench/gate.py`, in
`docs/evidence/gate.md`. How much a wrong token in the prefix moves this model on these prompts is measured each time
(`seen`).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sglang_probe.gate.arms import WRONG, Arms
from sglang_probe.gate.client import Answer, Facts
from sglang_probe.gate.compare import Pair, compare
from sglang_probe.gate.prompts import Case
from sglang_probe.stats.intervals import LEAST_CLUSTERS, mean_p

ALPHA = 0.05
FACTOR = 8.0
"""How much larger than any difference of cold with cold a wrong reuse must be."""
LEAST = {"float32": 1e-3, "bfloat16": 0.03, "float16": 0.01}
"""And how large at least, nats: by the rounding of the model's numbers; of an unknown dtype as of the coarsest."""
DISAGREE = 0.5
"""Cold answers whose median difference is larger, nats, are no yardstick for anything."""
PATHS = {
    "branch": "cold",
    "repeat": "cold",
    "staged": "cold",
    "turns": "turns-cold",
    "company": "company-cold",
    "cancelled": "company-cold",
}
"""Each path of reuse, and the arm that it is compared with."""
UNKNOWN_PAGE = 64


class Verdict(enum.Enum):
    """What the gate says, and the exit code of the command."""

    EQUAL = "EQUAL"
    WITHIN_FLOOR = "WITHIN FLOOR"
    CHANGES = "REUSE CHANGES OUTPUTS"
    WRONG = "WRONG REUSE"
    INCONCLUSIVE = "INCONCLUSIVE"

    @property
    def exit_code(self) -> int:
        """0, 10, 11, 12, 13: 1 and 2 are what other commands mean by them."""
        return {"EQUAL": 0, "WITHIN_FLOOR": 10, "CHANGES": 11, "WRONG": 12, "INCONCLUSIVE": 13}[self.name]


@dataclass(frozen=True)
class Wrong:
    """One answer that reuse made wrong."""

    path: str
    case: int
    arm: str
    moved: float
    """Median |difference| to the nearer of the cold answers, nats."""
    border: int
    """Tokens that it reused."""
    parted: int | None
    origin: tuple[str, ...]
    """Requests whose entries it reused, with the span of each, where the probe records."""


@dataclass(frozen=True)
class Judgement:
    """Everything that the page says."""

    verdict: Verdict
    sentence: str
    reasons: tuple[str, ...]
    """Why nothing more could be said, and what was left out."""
    paths: pd.DataFrame
    """One row a path: cases, effect, floor, yardstick, flips, p-values."""
    cases: pd.DataFrame
    """One row a path and case."""
    wrong: tuple[Wrong, ...]
    threshold: float
    """T, nats."""
    yardstick: float
    """Y, nats."""
    seen: dict[int, float]
    """By number of wrong tokens in the prefix: the share of cases in which T would have been passed."""


def judge(cases: Sequence[Case], arms: Arms, facts: Facts) -> Judgement:
    """The verdict of what was sent."""
    page = facts.page_size or UNKNOWN_PAGE
    cold = _cold_pairs(arms)
    yardstick = max((p.typical for pairs in cold.values() for p in pairs), default=math.nan)
    threshold = max(FACTOR * (0.0 if math.isnan(yardstick) else yardstick), LEAST.get(_dtype(facts), LEAST["bfloat16"]))
    rows: list[dict[str, object]] = []
    wrong: list[Wrong] = []
    for path, base in PATHS.items():
        for i, case in enumerate(cases):
            if not all(i in arms.get(f"{path}-{k}", {}) for k in (1, 2)):
                continue
            colds = [arms.get(f"{base}-{k}", {}).get(i) for k in (1, 2)]
            warms = [arms[f"{path}-{k}"][i] for k in (1, 2)]
            if colds[0] is None or colds[1] is None:
                continue
            both = [c for c in colds if c is not None]
            why = _unfit(both, warms, case, path, page)
            row: dict[str, object] = {"path": path, "case": case.name, "left_out": why, "cached": warms[0].cached}
            if not why:
                row |= _row(both, warms, cold.get(i, []))
                wrong += _wrong(path, i, both, warms, threshold)
            rows.append(row)
    table = pd.DataFrame(rows, columns=_COLUMNS)
    good = table[table["left_out"] == ""]
    paths = _paths(good)
    seen = {n: _seen(arms, n, threshold) for n in WRONG}
    reasons = _reasons(table, facts, yardstick)
    verdict, sentence = _verdict(good, len(table), paths, wrong, yardstick, threshold, seen, reasons, cases)
    return Judgement(verdict, sentence, tuple(reasons), paths, table, tuple(wrong), threshold, yardstick, seen)


_COLUMNS = ["path", "case", "left_out", "cached", "positions", "effect", "floor", "yardstick", "most", "typical"]
_COLUMNS += ["flips", "floor_flips", "parted", "equal"]


def _row(colds: Sequence[Answer], warms: Sequence[Answer], cold: Sequence[Pair]) -> dict[str, object]:
    effects = [compare(colds[0], warms[1]), compare(colds[1], warms[0])]
    floors = [compare(colds[0], colds[1]), compare(warms[0], warms[1])]
    parted = [p.parted for p in effects if p.parted is not None]
    return {
        "positions": len(effects[0].all),
        "effect": float(np.mean([p.mean for p in effects])),
        "floor": float(np.mean([p.mean for p in floors])),
        "yardstick": max((p.mean for p in cold), default=0.0),
        "most": max(p.most for p in effects),
        "typical": float(np.mean([p.typical for p in effects])),
        "flips": float(np.mean([p.parted is not None for p in effects])),
        "floor_flips": float(np.mean([p.parted is not None for p in floors])),
        "parted": min(parted) if parted else None,
        "equal": all(p.equal for p in effects),
    }


def _cold_pairs(arms: Arms) -> dict[int, list[Pair]]:
    """Of every case, all comparisons of cold with cold in which the surroundings changed."""
    found: dict[int, list[Pair]] = {}
    for i, one in arms.get("cold-1", {}).items():
        pairs = found.setdefault(i, [])
        for arm in ("cold-2", "company-cold-1", "company-cold-2", "extended"):
            other = arms.get(arm, {}).get(i)
            if other is not None and one.cached == 0 and other.cached == 0:
                pairs.append(compare(one, other, outputs=arm != "extended"))
    return {i: [p for p in pairs if len(p.all)] for i, pairs in found.items()}


def _unfit(colds: Sequence[Answer], warms: Sequence[Answer], case: Case, path: str, page: int) -> str:
    """Why a case says nothing on this path; empty if it does."""
    if any(a.cached is None for a in (*colds, *warms)):
        return "the server reports no cached tokens"
    if any(a.cached for a in colds):
        return f"cold was not cold: {max(a.cached or 0 for a in colds)} tokens came from the cache"
    whole = {"repeat": len(case.prompt) - 1, "turns": len(case.prompt)}.get(path, len(case.prefix))
    least = max(1, whole - (page - 1))
    if any((a.cached or 0) < least for a in warms):
        return f"warm was not warm: {min(a.cached or 0 for a in warms)} of {whole} tokens came from the cache"
    return ""


def _wrong(path: str, case: int, colds: Sequence[Answer], warms: Sequence[Answer], threshold: float) -> list[Wrong]:
    found = []
    for k, warm in enumerate(warms, 1):
        nearer = min((compare(c, warm) for c in colds), key=lambda p: p.typical)
        if nearer.typical > threshold:
            origin = tuple(
                f"{s.get('origin') or 'before the recording'} [{s.get('start')}, {s.get('end')})"
                for s in warm.origin
                if s.get("status") == "reused"
            )
            arm = f"{path}-{k}"
            found.append(Wrong(path, case, arm, nearer.typical, warm.cached or 0, nearer.parted, origin))
    return found


def _paths(good: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for path, part in good.groupby("path", sort=False):
        n = len(part)
        moved = part["effect"].to_numpy(float) - np.maximum(part["floor"], part["yardstick"]).to_numpy(float)
        flipped = part["flips"].to_numpy(float) - part["floor_flips"].to_numpy(float)
        enough = n >= LEAST_CLUSTERS
        p = mean_p(np.stack([moved, flipped], axis=1)) if enough else np.full(2, np.nan)
        rows.append(
            {
                "path": path,
                "cases": n,
                "positions": int(part["positions"].sum()),
                "equal": int(part["equal"].astype(bool).sum()),
                "effect": part["effect"].mean(),
                "floor": part["floor"].mean(),
                "yardstick": part["yardstick"].mean(),
                "most": part["most"].max(),
                "flips": part["flips"].mean(),
                "floor_flips": part["floor_flips"].mean(),
                "parted": part["parted"].min(),
                "p_moved": p[0] if moved.mean() > 0 else (1.0 if enough else np.nan),
                "p_flips": p[1] if flipped.mean() > 0 else (1.0 if enough else np.nan),
            }
        )
    columns = ["path", "cases", "positions", "equal", "effect", "floor", "yardstick", "most", "flips", "floor_flips"]
    return pd.DataFrame(rows, columns=[*columns, "parted", "p_moved", "p_flips"])


def enough(paths: int) -> int:
    """Cases with which a test on one of so many paths can reject at all, by both measures and Holm's correction."""
    return max(LEAST_CLUSTERS, math.ceil(1 + math.log2(2 * paths / ALPHA)))


def holm(p: Sequence[float], alpha: float = ALPHA) -> list[bool]:
    """Which hypotheses are rejected (Holm 1979); NaN never is, and counts as one."""
    order = sorted(range(len(p)), key=lambda i: (math.isnan(p[i]), p[i]))
    rejected = [False] * len(p)
    for rank, i in enumerate(order):
        if math.isnan(p[i]) or p[i] > alpha / (len(p) - rank):
            break
        rejected[i] = True
    return rejected


def _seen(arms: Arms, wrong: int, threshold: float) -> float:
    """Share of the cases in which so many wrong tokens in the prefix move the tail past the threshold."""
    pairs = [
        compare(arms["cold-1"][i], other, outputs=False)
        for i, other in arms.get(f"control-{wrong}", {}).items()
        if i in arms.get("cold-1", {})
    ]
    return float(np.mean([p.typical > threshold for p in pairs])) if pairs else math.nan


def _reasons(table: pd.DataFrame, facts: Facts, yardstick: float) -> list[str]:
    found = []
    if facts.radix is False:
        found.append("the server runs with its radix cache disabled: nothing is reused")
    for (path, why), part in table[table["left_out"] != ""].groupby(["path", "left_out"], sort=False):
        found.append(f"{path}: {len(part)} cases left out, because {why}")
    if yardstick > DISAGREE:
        found.append(
            f"cold requests differ among themselves by {yardstick:.2f} nats (median): something other than reuse "
            "changes this server's answers"
        )
    return found


def _verdict(
    good: pd.DataFrame,
    total: int,
    paths: pd.DataFrame,
    wrong: Sequence[Wrong],
    yardstick: float,
    threshold: float,
    seen: dict[int, float],
    reasons: list[str],
    cases: Sequence[Case],
) -> tuple[Verdict, str]:
    if wrong and yardstick <= DISAGREE:
        w = max(wrong, key=lambda w: w.moved)
        named = f", whose entries are of {w.origin[0]}" if w.origin else ""
        return Verdict.WRONG, (
            f"{_differ(len(wrong))} cold ones by more than rounding can: on the path "
            f"`{w.path}`, {cases[w.case].name}, by {w.moved:.3g} nats at half of the positions after {w.border} reused "
            f"tokens{named}; cold answers differ by {yardstick:.2g} at most, and the threshold is {threshold:.2g}."
        )
    if yardstick > DISAGREE or math.isnan(yardstick):
        return Verdict.INCONCLUSIVE, reasons[-1] + "." if reasons else "No cold request could be compared."
    if good.empty or 2 * len(good) < total:
        return Verdict.INCONCLUSIVE, f"Too little was reused to say anything: {'; '.join(reasons) or 'no warm answer'}."
    if bool(good["equal"].astype(bool).all()):
        return Verdict.EQUAL, (
            f"All {len(good)} comparisons of warm with cold are equal to the last bit: "
            f"{int(good['positions'].sum()):,} log-probabilities, and every greedy token."
        )
    if int(paths["cases"].min()) < (least := enough(len(paths))):
        return Verdict.INCONCLUSIVE, (
            f"Warm differs from cold, and {int(paths['cases'].min())} cases are too few to compare that with the "
            f"floor: {least} are needed (`--cases`)."
        )
    p = [*paths["p_moved"], *paths["p_flips"]]
    beyond = [i for i, yes in enumerate(holm(p)) if yes]
    if beyond:
        first = min(beyond, key=lambda i: p[i])
        row = paths.iloc[first % len(paths)]
        cold = max(row["floor"], row["yardstick"])
        what = (
            f"log-probabilities move by {row['effect']:.2g} nats in the mean (largest {row['most']:.2g}), where cold "
            f"runs differ by {cold:.2g}"
            if first < len(paths)
            else f"{row['flips']:.0%} of the answers have another greedy token, where {row['floor_flips']:.0%} of the "
            "floor have"
        )
        also = f", and {row['flips']:.0%} of the answers get another greedy token" if first < len(paths) else ""
        return Verdict.CHANGES, (
            f"On the path `{row['path']}` {what}{also}. It is of the size of rounding, below the {threshold:.2g} nats "
            "that would say wrong entries."
        )
    blind = seen.get(WRONG[-1], math.nan)
    if not blind >= 0.5:
        return Verdict.INCONCLUSIVE, (
            f"Warm differs from cold no more than cold runs do among themselves, but {WRONG[-1]} wrong tokens in the "
            f"prefix would have been seen in {blind:.0%} of the cases only: these prompts do not show what is reused."
        )
    worst = paths.loc[paths["effect"].idxmax()]
    return Verdict.WITHIN_FLOOR, (
        f"Warm differs from cold by {worst['effect']:.2g} nats in the mean at most (largest "
        f"{paths['most'].max():.2g}), no more than cold runs differ among themselves; {paths['flips'].max():.0%} "
        f"greedy flips on the worst path against {paths['floor_flips'].max():.0%} in the floor."
    )


def _differ(n: int) -> str:
    return "One warm answer differs from both of its" if n == 1 else f"{n} warm answers differ from both of their"


def _dtype(facts: Facts) -> str:
    return (facts.dtype or "").removeprefix("torch.")
