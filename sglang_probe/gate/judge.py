"""The verdict: what was reused, compared with what was computed anew, beside the difference that reuse has no part in.

**Effect and floor.** Every request was sent twice cold and twice warm, in two orders. The effect of a path pairs cold
of one order with warm of the other; its floor pairs cold with cold and warm with warm across the same two orders, so
that both have the same change of order in them (`docs/explanation/floors-and-intervals.md`). The *yardstick* of a case
is the largest difference between two of its cold requests when only its surroundings changed: alone against in company,
and with more tokens after it. Rounding that depends on the shapes of a forward pass shows there, as it does when a
prefill begins at a border instead of at zero; reuse has no part in it.

**REUSE CHANGES OUTPUTS**: on some path, either greedy flips are more frequent than in the floor, or the mean
|difference of log-probabilities| is larger than floor and yardstick, over cases. All paths and both measures are one
question: signs of whole cases are flipped (`sglang_probe.stats.multiple.sign_flip_max`, one-sided at 2.5 % for all
together, of the null that each case's difference is symmetric about zero or lower), so that paths that say the same of
the same cases are not paid for twice. With n cases no p is below 2**(-n): a path with fewer than `LEAST_CLUSTERS` could
not be rejected, and is not tested; if it differs, and no other rejects, that is INCONCLUSIVE.

**WRONG REUSE**: some warm answer `w` of case i differs from *both* of its cold answers by more than rounding can:

    min over k of median over positions |logp_w - logp_cold_k|  >  T_i,    T_i = max(FACTOR * max(Y, Y_i), LEAST[dtype])

with positions from the border of reuse on (forced tokens of the prompt, then generated ones until they part), Y_i the
largest such median among the comparisons of cold with cold of case i (other order, in company, with more tokens after),
and Y the largest Y_i, where none counts for more than `SPREAD` times the (lower) median of all Y_i: one odd cold answer
raises the threshold of its own case, and that of the others by so much at most. The median over positions asks for many
of them, so that one near-tie (an expert of a mixture, a rare token) does not raise it; both cold answers, so that a
fault of one cold request does not. `LEAST` is there because a server may be exactly repeatable (Y = 0) and yet round
differently at a border. A warm answer with log-probabilities that are no numbers, where both cold ones have numbers, is
wrong at any threshold.

**What is missing counts.** Every case of every path that was asked is a row. A warm request without an answer, where
the cold ones of the same tokens have theirs, leaves no verdict but WRONG REUSE and INCONCLUSIVE; so does a path of
which half of the cases or more say nothing. A warm answer that is shorter than the cold ones, or has log-probabilities
that are no numbers where theirs are, counts as none, whatever it reused. REUSE CHANGES OUTPUTS and WITHIN FLOOR both
say that entries are right up to rounding: where `WRONG[-1]` wrong tokens would have passed below the threshold, neither
can be said.

The rate of false alarms of a whole gate (10 cases, 6 paths, 2 orders) where rounding is lognormal and `r` times as
large at a border as elsewhere, and the power by the size of what is wrong: `python bench/gate.py`, in
`docs/evidence/gate.md`. How much a wrong token in the prefix moves this model on these prompts is measured each time
(`seen`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sglang_probe.gate.arms import WRONG, Arms
from sglang_probe.gate.client import Answer, Facts
from sglang_probe.gate.compare import Pair, compare
from sglang_probe.gate.prompts import Case
from sglang_probe.gate.verdict import DISAGREE, Verdict, Wrong, verdict_of
from sglang_probe.stats.intervals import LEAST_CLUSTERS
from sglang_probe.stats.multiple import sign_flip_max

FACTOR = 8.0
"""How much larger than differences of cold with cold a wrong reuse must be."""
SPREAD = 4.0
"""How much further apart than those of the middle case cold answers may be and count for all cases."""
LEAST = {"float32": 1e-3, "bfloat16": 0.03, "float16": 0.01}
"""And how large at least, nats: by the rounding of the model's numbers; of an unknown dtype as of the coarsest."""
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
    """T, nats: that of a case whose own cold answers are no further apart than Y."""
    yardstick: float
    """Y, nats."""
    seen: dict[int, float]
    """By number of wrong tokens in the prefix: the share of cases in which T_i would have been passed."""


def judge(
    cases: Sequence[Case],
    arms: Arms,
    facts: Facts,
    *,
    paths: Sequence[str] = tuple(PATHS),
    refused: Mapping[str, Mapping[int, str]] | None = None,
    unsent: Mapping[str, str] | None = None,
) -> Judgement:
    """The verdict of what was sent.

    Args:
        paths: those that were asked; each must say something.
        refused: by arm and case, why there is no answer.
        unsent: by path, why it was not asked: the verdict does not speak of it.
    """
    page = facts.page_size or UNKNOWN_PAGE
    cold = _cold_pairs(arms)
    own = {i: max(p.typical for p in pairs) for i, pairs in cold.items() if pairs}
    yardstick = yardstick_of(sorted(own.values())) if own else math.nan
    least = LEAST.get(_dtype(facts), LEAST["bfloat16"])
    threshold = max(FACTOR * (yardstick if own else 0.0), least)
    limit = {i: max(FACTOR * own.get(i, 0.0), threshold) for i in range(len(cases))}
    rows: list[dict[str, object]] = []
    wrong: list[Wrong] = []
    for path, i in [(path, i) for path in paths for i in range(len(cases))]:
        colds, warms = _answers(arms, PATHS[path], i), _answers(arms, path, i)
        why = _no_answer(colds, PATHS[path], i, refused or {}) or _not_cold(list(colds.values()), own.get(i, 0.0))
        if not why:
            wrong += _wrong(path, i, list(colds.values()), warms, limit[i])
        no_answer = _no_answer(warms, path, i, refused or {}) or _not_whole(list(colds.values()), list(warms.values()))
        prior = arms.get("cold-1", {}).get(i)
        why = why or no_answer or _not_warm(list(warms.values()), cases[i], path, page, prior)
        row = {"path": path, "case": cases[i].name, "left_out": why, "no_answer": bool(no_answer and len(colds) == 2)}
        row["cached"] = warms[1].cached if 1 in warms else None
        if not why:
            row |= _row(list(colds.values()), list(warms.values()), cold.get(i, []))
            if not row["positions"]:
                row["left_out"] = "no position came back that could be compared"
        rows.append(row)
    table = pd.DataFrame(rows, columns=_COLUMNS)
    good = table[table["left_out"] == ""]
    by_path = _paths(good)
    seen = {n: _seen(arms, n, limit) for n in WRONG}
    reasons = _reasons(table, facts, yardstick, unsent or {})
    verdict, sentence = verdict_of(table, by_path, wrong, yardstick, threshold, seen, reasons, cases)
    return Judgement(verdict, sentence, tuple(reasons), by_path, table, tuple(wrong), threshold, yardstick, seen)


_COLUMNS = [
    "path",
    "case",
    "left_out",
    "no_answer",
    "cached",
    "positions",
    "effect",
    "floor",
    "yardstick",
    "cold",
    "most",
    "typical",
]
_COLUMNS += ["flips", "floor_flips", "parted", "equal"]


def yardstick_of(own: Sequence[float]) -> float:
    """Y of differences of cold with cold, nats, in ascending order: the largest, `SPREAD` times the median at most."""
    return min(own[-1], SPREAD * own[(len(own) - 1) // 2])


def _row(colds: Sequence[Answer], warms: Sequence[Answer], cold: Sequence[Pair]) -> dict[str, object]:
    effects = [compare(colds[0], warms[1]), compare(colds[1], warms[0])]
    floors = [compare(colds[0], colds[1]), compare(warms[0], warms[1])]
    parted = [p.parted for p in effects if p.parted is not None]
    return {
        "positions": min(len(p.all) for p in effects),
        "effect": float(np.mean([p.mean for p in effects])),
        "floor": (floor := float(np.mean([p.mean for p in floors]))),
        "yardstick": (apart := max((p.mean for p in cold), default=0.0)),
        "cold": max(floor, apart),
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
            if other is not None and one.cached == 0 and other.cached == 0 and one.finite and other.finite:
                pairs.append(compare(one, other, outputs=arm != "extended"))
    return {i: [p for p in pairs if len(p.all)] for i, pairs in found.items()}


def _answers(arms: Arms, name: str, case: int) -> dict[int, Answer]:
    """By order, those of a case that came."""
    return {k: arms[f"{name}-{k}"][case] for k in (1, 2) if case in arms.get(f"{name}-{k}", {})}


def _no_answer(answers: Mapping[int, Answer], name: str, case: int, refused: Mapping[str, Mapping[int, str]]) -> str:
    """Why one of a case's two answers is not there; empty if both are."""
    missing = next((f"{name}-{k}" for k in (1, 2) if k not in answers), None)
    return "" if missing is None else f"no answer: {refused.get(missing, {}).get(case, f'none of `{missing}` came')}"


def _not_whole(colds: Sequence[Answer], warms: Sequence[Answer]) -> str:
    """Why a warm answer is as good as none, whatever it reused; empty if all are whole, or cold ones are no better."""
    if all(a.finite for a in colds) and not all(a.finite for a in warms):
        return "a warm answer has log-probabilities that are no numbers"
    made, asked = (f([len(a.output) for a in of] or [0]) for f, of in ((min, warms), (max, colds)))
    return f"{made} of {asked} tokens came back" if made < asked else ""


def _not_cold(colds: Sequence[Answer], own: float) -> str:
    """Why nothing can be compared with these two cold answers; empty if it can."""
    if any(a.cached is None for a in colds):
        return "the server reports no cached tokens"
    if any(a.cached for a in colds):
        return f"cold was not cold: {max(a.cached or 0 for a in colds)} tokens came from the cache"
    if not all(a.finite for a in colds):
        return "a cold answer has log-probabilities that are no numbers"
    return f"its cold answers are more than {DISAGREE:g} nats apart" if own > DISAGREE else ""


def _not_warm(warms: Sequence[Answer], case: Case, path: str, page: int, prior: Answer | None) -> str:
    """Why two warm answers say nothing of reuse; empty if they do.

    Args:
        prior: whose answer the further turn of `turns` goes on from.
    """
    if any(a.cached is None for a in warms):
        return "the server reports no cached tokens"
    cached = min(a.cached or 0 for a in warms)
    if path == "turns":
        # The turn before, asked anew, may have had another answer from some token on: what both have is reused.
        made = len(prior.output) - 1 if prior else 0  # the last one was never the input of a forward pass
        least, of = (
            len(case.prompt) + 1,
            f"{len(case.prompt) + made} tokens came from the cache, none of them generated",
        )
    else:
        whole = len(case.prompt) - 1 if path == "repeat" else len(case.prefix)
        least, of = max(1, whole - (page - 1)), f"{whole} tokens came from the cache"
    return f"warm was not warm: {cached} of {of}" if cached < least else ""


def _wrong(path: str, case: int, colds: Sequence[Answer], warms: Mapping[int, Answer], limit: float) -> list[Wrong]:
    """Those of the warm answers that reused something and are wrong."""
    found = []
    for k, warm in warms.items():
        nearer = min((compare(c, warm) for c in colds), key=lambda p: p.typical)
        moved = nearer.typical if warm.finite else math.inf
        if warm.cached and moved > limit:
            origin = tuple(
                f"{s.get('origin') or 'before the recording'} [{s.get('start')}, {s.get('end')})"
                for s in warm.origin
                if s.get("status") == "reused"
            )
            found.append(Wrong(path, case, f"{path}-{k}", moved, warm.cached, nearer.parted, origin, limit))
    return found


def _paths(good: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for path, part in good.groupby("path", sort=False):
        rows.append(
            {
                "path": path,
                "cases": len(part),
                "positions": int(part["positions"].sum()),
                "equal": int(part["equal"].astype(bool).sum()),
                **{name: part[name].mean() for name in ("effect", "floor", "yardstick", "cold")},
                "most": part["most"].max(),
                "flips": part["flips"].mean(),
                "floor_flips": part["floor_flips"].mean(),
                "parted": part["parted"].min(),
            }
        )
    columns = ["path", "cases", "positions", "equal", "effect", "floor", "yardstick", "cold", "most", "flips"]
    found = pd.DataFrame(rows, columns=[*columns, "floor_flips", "parted"])
    return found.assign(**_p_values(good, list(found["path"])))


def _p_values(good: pd.DataFrame, paths: Sequence[str]) -> dict[str, list[float]]:
    """Of each path: that it moves more than cold runs, and that it flips more than the floor, adjusted for all that are
    tested; NaN of a path with fewer than `LEAST_CLUSTERS` cases, which is not."""
    counts = good["path"].value_counts()
    tested = [path for path in paths if counts[path] >= LEAST_CLUSTERS]
    if not tested:
        return {"p_moved": [math.nan] * len(paths), "p_flips": [math.nan] * len(paths)}
    told = good.assign(moved=good["effect"] - good["cold"], flipped=good["flips"] - good["floor_flips"])
    wide = told.astype({"moved": float, "flipped": float}).pivot(index="case", columns="path")
    both = np.concatenate([wide[name][tested].to_numpy(float) for name in ("moved", "flipped")], axis=1)
    moved, flips = (dict(zip(tested, p, strict=True)) for p in np.split(sign_flip_max(both), 2))
    return {
        "p_moved": [float(moved.get(path, math.nan)) for path in paths],
        "p_flips": [float(flips.get(path, math.nan)) for path in paths],
    }


def _seen(arms: Arms, wrong: int, limit: Mapping[int, float]) -> float:
    """Share of the cases in which so many wrong tokens in the prefix move the tail past the threshold."""
    cold = arms.get("cold-1", {})
    seen = [
        compare(cold[i], other, outputs=False).typical > limit[i]
        for i, other in arms.get(f"control-{wrong}", {}).items()
        if i in cold and cold[i].finite
    ]
    return float(np.mean(seen)) if seen else math.nan


def _reasons(table: pd.DataFrame, facts: Facts, yardstick: float, unsent: Mapping[str, str]) -> list[str]:
    found = [f"{path}: not asked, because {why}" for path, why in unsent.items()]
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


def _dtype(facts: Facts) -> str:
    return (facts.dtype or "").removeprefix("torch.")
