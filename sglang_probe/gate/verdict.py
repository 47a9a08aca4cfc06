"""Which verdict, and its sentence; what each means is in `sglang_probe.gate.judge`."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from sglang_probe.gate.arms import WRONG
from sglang_probe.gate.prompts import Case
from sglang_probe.stats.intervals import LEAST_CLUSTERS

ALPHA = 0.025
"""Of one-sided tests, for all paths and both measures together."""
DISAGREE = 0.5
"""Cold answers whose median difference is larger, nats, are no yardstick for anything."""


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
    """Median |difference| to the nearer of the cold answers, nats; infinite if its log-probabilities are no numbers."""
    border: int
    """Tokens that it reused."""
    parted: int | None
    origin: tuple[str, ...]
    """Requests whose entries it reused, with the span of each, where the probe records."""
    threshold: float
    """T_i of its case, nats."""


def verdict_of(
    table: pd.DataFrame,
    paths: pd.DataFrame,
    wrong: Sequence[Wrong],
    yardstick: float,
    threshold: float,
    seen: dict[int, float],
    reasons: list[str],
    cases: Sequence[Case],
) -> tuple[Verdict, str]:
    """The verdict, and the sentence that says why.

    Args:
        table: a row a path and case, those that were left out too.
        paths: a row a path, of the cases that were not.
    """
    if wrong and (yardstick <= DISAGREE or any(math.isinf(w.moved) for w in wrong)):
        return Verdict.WRONG, _wrong_sentence(wrong, yardstick, cases)
    if yardstick > DISAGREE or math.isnan(yardstick):
        return Verdict.INCONCLUSIVE, reasons[-1] + "." if reasons else "No cold request could be compared."
    good = table[table["left_out"] == ""]
    if n := int(table["no_answer"].sum()):
        first = table[table["no_answer"]].iloc[0]
        return Verdict.INCONCLUSIVE, (
            f"In {n} of {len(table)} comparisons a warm request got no answer, or one that is not whole, where the "
            "cold ones of the same tokens were answered: "
            f"on the path `{first['path']}`, {first['case']}, {first['left_out']}."
        )
    of = (table["left_out"] == "").groupby(table["path"], sort=False).mean()
    if table.empty or (of <= 0.5).any():
        which = ", ".join(f"`{path}`" for path in of.index[of <= 0.5]) or "any path"
        return Verdict.INCONCLUSIVE, f"Too little was reused to say anything of {which}: {'; '.join(reasons)}."
    names = ", ".join(paths["path"])
    left = f" {len(table) - len(good)} further comparisons were left out." if len(good) < len(table) else ""
    if bool(good["equal"].astype(bool).all()):
        return Verdict.EQUAL, (
            f"All {len(good)} comparisons of warm with cold are equal to the last bit: "
            f"{int(good['positions'].sum()):,} log-probabilities, and every greedy token, on {names}.{left}"
        )
    few = paths[paths["cases"] < LEAST_CLUSTERS]
    untested = ", ".join(f"`{r.path}` ({r.cases})" for r in few.itertuples())
    if untested:
        left += f" Too few cases to test: {untested}."
    blind = not seen.get(WRONG[-1], math.nan) >= 0.5
    share = f"{WRONG[-1]} wrong tokens in the prefix would have been seen in {seen.get(WRONG[-1], math.nan):.0%} of the"
    p = [*paths["p_moved"], *paths["p_flips"]]
    beyond = [i for i in range(len(p)) if p[i] <= ALPHA]
    if beyond:
        first = min(beyond, key=lambda i: p[i])
        row = paths.iloc[first % len(paths)]
        what = (
            f"log-probabilities move by {row['effect']:.2g} nats in the mean (largest {row['most']:.2g}), where cold "
            f"runs differ by {row['cold']:.2g}"
            if first < len(paths)
            else f"{row['flips']:.0%} of the answers have another greedy token, where {row['floor_flips']:.0%} of the "
            "floor have"
        )
        also = f", and {row['flips']:.0%} of the answers get another greedy token" if first < len(paths) else ""
        said = f"On the path `{row['path']}` {what}{also}."
        if blind:
            return Verdict.INCONCLUSIVE, (
                f"{said} That cannot be told from wrong entries: {share} cases only, above {threshold:.2g} nats."
            )
        return Verdict.CHANGES, (
            f"{said} It is of the size of rounding, below the {threshold:.2g} nats that would say wrong entries."
            f" Asked on {names}.{left}"
        )
    if (few["equal"] < few["cases"]).any():
        return Verdict.INCONCLUSIVE, (
            f"Warm differs from cold, and {int(few['cases'].min())} cases are too few to compare that with the floor, "
            f"on {untested}: {LEAST_CLUSTERS} are needed (`--cases`)."
        )
    if blind:
        return Verdict.INCONCLUSIVE, (
            f"Warm differs from cold no more than cold runs do among themselves, but {share} cases only: these prompts "
            "do not show what is reused."
        )
    worst = paths.loc[paths["effect"].idxmax()]
    told = "no more than cold runs differ among themselves"
    if worst["effect"] > worst["cold"]:
        questions = 2 * (len(paths) - len(few))
        told = (
            f"on `{worst['path']}`; cold runs differ by {worst['cold']:.2g}, and {worst['cases']:.0f} cases do not "
            f"show that this is more (p = {worst['p_moved']:.2g}, adjusted for {questions} questions): more "
            "cases may (`--cases`)"
        )
    return Verdict.WITHIN_FLOOR, (
        f"Warm differs from cold by {worst['effect']:.2g} nats in the mean at most (largest "
        f"{paths['most'].max():.2g}), {told}; {paths['flips'].max():.0%} "
        f"greedy flips on the worst path against {paths['floor_flips'].max():.0%} in the floor. Asked on {names}.{left}"
    )


def _wrong_sentence(wrong: Sequence[Wrong], yardstick: float, cases: Sequence[Case]) -> str:
    w = max(wrong, key=lambda w: w.moved)
    named = f", whose entries are of {w.origin[0]}" if w.origin else ""
    n = len(wrong)
    differ = "One warm answer differs from both of its" if n == 1 else f"{n} warm answers differ from both of their"
    if math.isinf(w.moved):
        return (
            f"{differ} cold ones: on the path `{w.path}`, {cases[w.case].name}, log-probabilities are no numbers after "
            f"{w.border} reused tokens{named}, and those of the cold answers are."
        )
    return (
        f"{differ} cold ones by more than rounding can: on the path `{w.path}`, {cases[w.case].name}, by {w.moved:.3g} "
        f"nats at half of the positions after {w.border} reused tokens{named}; cold answers differ by {yardstick:.2g} "
        f"at most, odd ones aside, and the threshold of this case is {w.threshold:.2g}."
    )
