"""What the runs say of each dose: effect, side effects, repetition, and which arm gains most at equal side effect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.eviction.likelihood import load_unembedding
from sglang_probe.run.run import Run
from sglang_probe.stats.intervals import mean_intervals
from sglang_probe.studies.base import records
from sglang_probe.studies.steer_decay.target import token_ids
from sglang_probe.studies.steer_dose.config import SteerDoseConfig
from sglang_probe.studies.steer_dose.names import FORCED, FREE, NEUTRAL, PLAIN, SELECTION, Place
from sglang_probe.studies.steer_dose.select import output_scores
from sglang_probe.studies.steer_dose.statistics import at_levels, compare, doses, incomplete, paths, per_family, without
from sglang_probe.studies.steer_dose.steps import measured, places, repetition
from sglang_probe.verify.check import Check, all_hold
from sglang_probe.verify.verify import verify
from sglang_probe.workload.request import asked_rid

FREE_MEASURES = ("target", "distinct", "repeated")


@dataclass(frozen=True)
class SteerDoseResult:
    """Everything the report and the terminal show; frames are tidy."""

    name: str
    doses: pd.DataFrame
    """`arm, dose, strength`; `shift` on texts; `kl, nll, own_shift` on neutral ones, each with its interval;
    `text_kl`."""
    vectors: pd.DataFrame
    """The same of every vector of every arm, without intervals."""
    levels: pd.DataFrame
    """`statistics.at_levels`."""
    registered: pd.DataFrame
    """`statistics.compare`."""
    free: pd.DataFrame
    """`arm, dose, strength`, and over the plain model: `target` (share of the target's tokens), `distinct` (distinct-2)
    and `repeated` (share of repeated 8-grams), with intervals; `plain_<m>` is the plain model's."""
    selection: pd.DataFrame
    """`select.output_scores`; empty without features to choose."""
    steps: pd.DataFrame
    texts: int
    neutral: int
    targets: Mapping[str, list[int]]
    checks: dict[str, list[Check]]
    manifest: dict[str, Any]
    config: SteerDoseConfig
    left_out: Sequence[str] = ()
    """Of each family that is left out, why."""

    @property
    def ok(self) -> bool:
        """Whether every invariant holds in every run."""
        return all_hold(self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "arms": {name: arm.model_dump(exclude_none=True) for name, arm in self.config.arms.items()},
            "steps": self.config.steps,
            "texts": self.texts,
            "neutral_texts": self.neutral,
            "targets": dict(self.targets),
            "left_out": list(self.left_out),
            **{k: records(frame) for k, frame in self.tables().items() if k != "steps"},
            "versions": self.manifest["versions"],
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table."""
        names = ("registered", "levels", "doses", "vectors", "free", "selection", "steps")
        return {k: getattr(self, k) for k in names}


def study_dose(
    runs: Mapping[str, Run], config: SteerDoseConfig, name: str, *, tell: Callable[[str], None] = lambda _: None
) -> SteerDoseResult:
    """Measure every dose.

    Raises:
        ProbeError: a step of a request has no row, no family has a finite number at every dose, or the model's
            unembedding cannot be read.
    """
    checks = {}
    for run_name, run in runs.items():
        tell(f"verifying {run_name}")
        checks[run_name] = verify(run)
    forced = runs[FORCED]
    model = Path(forced.manifest["model_path"])
    positive, negative = (token_ids(model, t) for t in (config.target.positive, config.target.negative))
    tell("comparing predictions")
    at = places(forced, config.steps)
    at = at[at["arm"] != PLAIN].reset_index(drop=True)
    steps = measured(forced, at, load_unembedding(model), positive, negative)
    lacking = incomplete(per_family(steps))
    steps = without(steps, lacking)
    families = per_family(steps)
    found = paths(families)
    first = next(iter(found.values()))
    return SteerDoseResult(
        name=name,
        doses=with_strengths(side_by_side(doses(families)), config),
        vectors=by_vector(steps, config),
        levels=at_levels(found, config.side_effects),
        registered=compare(found, config.registered),
        free=_free(runs[FREE], config, positive) if FREE in runs else pd.DataFrame(),
        selection=output_scores(runs[SELECTION], config) if SELECTION in runs else pd.DataFrame(),
        steps=steps.drop(columns=["row", "plain"]),
        texts=len(first.effect_TK),
        neutral=len(first.side_NK),
        targets={"positive": positive, "negative": negative},
        checks=checks,
        manifest=forced.manifest,
        config=config,
        left_out=[told(*one) for one in lacking],
    )


def told(scope: str, family: str, arm: str, dose: int) -> str:
    """What is said of a family that is left out."""
    kind = "neutral texts" if scope == NEUTRAL else "texts"
    return (
        f"Family `{family}` of {kind} is left out of every arm: arm `{arm}`, dose {dose} gave no finite number there."
    )


def side_by_side(by: pd.DataFrame) -> pd.DataFrame:
    """A row a dose: effects of texts and side effects of neutral ones."""
    ends = ("", "_low", "_high")
    text, neutral = (by[by["scope"] == scope].set_index(["arm", "dose"]) for scope in ("text", "neutral"))
    left = text[[f"shift{e}" for e in ends]].assign(text_kl=text["kl"], texts=text["families"])
    right = neutral[[f"{m}{e}" for m in ("kl", "nll") for e in ends]]
    right = right.assign(neutral_shift=neutral["shift"], neutral=neutral["families"])
    return left.join(right).reset_index()


def with_strengths(frame: pd.DataFrame, config: SteerDoseConfig) -> pd.DataFrame:
    """With the dose in words, in the order of the configuration."""
    order = list(config.arms)
    strengths = [config.arms[arm].levels[dose - 1] for arm, dose in zip(frame["arm"], frame["dose"], strict=True)]
    frame = frame.assign(strength=strengths, _order=frame["arm"].map(order.index))
    return frame.sort_values(["_order", "dose"], ignore_index=True).drop(columns="_order")


def by_vector(steps: pd.DataFrame, config: SteerDoseConfig) -> pd.DataFrame:
    """Effect and side effects of every vector and dose: means over texts."""
    keys = ["scope", "arm", "what", "dose"]
    by = steps.groupby([*keys, "family"], sort=False)[["kl", "shift", "nll"]].mean().groupby(keys).mean().reset_index()
    text, neutral = (by[by["scope"] == scope].drop(columns="scope") for scope in ("text", "neutral"))
    keys = keys[1:]
    frame = text[[*keys, "shift"]].merge(neutral[[*keys, "kl", "nll"]], on=keys)
    return with_strengths(frame, config)


def _free(run: Run, config: SteerDoseConfig, positive: list[int]) -> pd.DataFrame:
    """What each arm wrote by itself, over what the plain model wrote after the same prompt."""
    rows = []
    for r in run.requests().itertuples():
        place = Place.of(asked_rid(r.rid))
        ids = np.asarray(r.output_ids[: config.free_steps + 1])
        # Step s predicts output s, counted from 0: the first token comes from the prompt.
        target = float(np.isin(ids[1:], positive).mean())
        rows.append(
            {**vars(place), "family": r.family, **dict(zip(FREE_MEASURES, (target, *repetition(ids)), strict=True))}
        )
    told = pd.DataFrame(rows)
    names = list(FREE_MEASURES)
    plain = told[told["arm"] == PLAIN].set_index("text")[names]
    arms = told[told["arm"] != PLAIN]
    base = plain.loc[arms["text"]].to_numpy()
    over = arms.assign(**dict(zip(names, (arms[names].to_numpy() - base).T, strict=True)))
    by = over.groupby(["arm", "dose", "family"], sort=False)[names].mean().reset_index()
    ways = []
    for (arm, dose), mine in by.groupby(["arm", "dose"], sort=False):
        ends = mean_intervals(mine[names].to_numpy(np.float64))
        row = {"arm": arm, "dose": dose}
        for j, name in enumerate(names):
            row |= {name: ends.estimate[j], f"{name}_low": ends.low[j], f"{name}_high": ends.high[j]}
            row[f"plain_{name}"] = float(plain[name].mean())
        ways.append(row)
    return with_strengths(pd.DataFrame(ways), config)
