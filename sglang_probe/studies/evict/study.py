"""From the files of an eviction study to its result: every table of the report, the sanity row, and what failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.run.run import Run, load_run
from sglang_probe.studies import base
from sglang_probe.studies.evict.asked import ALL_KEPT, FULL_CACHE, check_served, over_repeats, with_full
from sglang_probe.studies.evict.grid import Entry, caveats, listing
from sglang_probe.studies.evict.judge import METRICS
from sglang_probe.studies.evict.layers import requests_of
from sglang_probe.studies.evict.likelihoods import FORCED_OUTCOMES, forced_outcomes
from sglang_probe.studies.evict.needed import NEEDED_FILE, needed_summary
from sglang_probe.studies.evict.outcome import OF_ANSWERS, OUTCOMES, judge_outputs
from sglang_probe.studies.evict.predict import predictor_pairs, predictors
from sglang_probe.studies.evict.summary import by_head, gaps, means, protection
from sglang_probe.verify.check import Check

OFFLINE_FILE, HEADS_FILE, EXCLUDED_FILE = "offline.parquet", "heads.parquet", "excluded.parquet"
POINTS_FILE = "points.parquet"
"""Of every policy, budget, protocol and task the mean of each offline metric beside the outcome."""

PREDICTORS = ("nontrivial", "prompt_mass", "mass", "hit", "hit_max", "hit_early", "ndcg", "rbo", "needed_kept")
_LEADING = ("accuracy", "success", "agreement", "nll", "nontrivial", "needed_kept")
"""Metrics that the summary has; the tables have all."""

PREDICTORS_LOW = ("output_error", "head_error", "gini", "lost_everywhere")
PROTECTED_METRICS = ("output_error", "mass")
"""In which protection is judged offline. Non-trivial mass would not do: it leaves out what is protected."""


@dataclass(frozen=True)
class Sanity:
    """The full cache through the eviction path: every token must be the full-cache run's own."""

    requests: int
    exact: int

    @property
    def holds(self) -> bool:
        """Whether all of them are."""
        return self.exact == self.requests


@dataclass(frozen=True)
class EvictionResult:
    """Everything that the report shows."""

    name: str
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    policies: pd.DataFrame
    """Label, kind, all parameters and source of every policy."""
    lengths: pd.DataFrame
    """Per task and protocol: prompts, positions compressed, and the positions of each budget."""
    offline: pd.DataFrame
    outcomes: dict[str, pd.DataFrame]
    """Means of the outcomes by way of decoding."""
    mass_gaps: pd.DataFrame
    outcome_gaps: pd.DataFrame
    predictors: pd.DataFrame
    heads: pd.DataFrame
    points: pd.DataFrame
    """Of every cell the mean of each predictor beside the greedy outcome."""
    excluded: pd.DataFrame
    asserted: int
    sanity: Sanity | None
    served: pd.DataFrame
    """Requests asked, failed and truncated, by task and way of decoding."""
    seconds: Mapping[str, float]
    caveats: Sequence[str] = ()
    """What a policy is not made for in this model."""
    outcome: str = "accuracy"
    """What predictors are held against."""
    needed: pd.DataFrame = field(default_factory=pd.DataFrame)
    """What the answers need, by task and protocol (`needed.needed_summary`); empty if it was not looked for."""
    predictor_pairs: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Which of two metrics predicts better (`predict.predictor_pairs`)."""
    protection: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Methods under the study's always-kept set beside the one that they are published with (`summary.protection`)."""

    @property
    def ok(self) -> bool:
        """Whether the sanity row holds and every request was served."""
        failed = int(self.served["failed"].sum()) if len(self.served) else 0
        return (self.sanity is None or self.sanity.holds) and not failed

    @property
    def asserted_in_engine(self) -> int:
        """Served requests whose kept counts were asserted."""
        return int(self.served["kept_counts_asserted"].sum()) if len(self.served) else 0

    @property
    def checks(self) -> dict[str, list[Check]]:
        """None: the sanity row is this study's own."""
        return {}

    def tables(self) -> dict[str, pd.DataFrame]:
        """Every table of the report."""
        measured = ("offline", "protection", "mass_gaps", "outcome_gaps", "predictors", "predictor_pairs", "heads")
        names = (*measured, "points", "policies", "excluded", "needed", "lengths", "served")
        frames = {name: getattr(self, name) for name in names}
        return frames | {f"outcomes_{d}": frame for d, frame in self.outcomes.items()}

    def to_json(self) -> dict[str, Any]:
        """What the report leads with."""
        return {
            "name": self.name,
            "config": self.config,
            "versions": self.manifest["versions"],
            "model": self.manifest["model"],
            "sanity": None if self.sanity is None else {"requests": self.sanity.requests, "exact": self.sanity.exact},
            "kept_counts_asserted": {"selections": self.asserted, "requests_in_engine": self.asserted_in_engine},
            "seconds": dict(self.seconds),
            "lengths": records(self.lengths),
            "served": records(self.served),
            "excluded": records(self.excluded),
            "caveats": list(self.caveats),
            "outcomes": {d: records(frame[frame["metric"].isin(_LEADING)]) for d, frame in self.outcomes.items()},
            "offline": records(self.offline[self.offline["metric"].isin(_LEADING)]),
            "outcome_gaps": records(self.outcome_gaps),
            "needed": records(self.needed),
            "predictors": records(self.predictors),
            "predictor_pairs": records(self.predictor_pairs),
            "protection": records(self.protection),
            "policies": records(self.policies),
        }


def study_eviction(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    entries: Sequence[Entry],
    full: Mapping[str, Run],
    decodes: Sequence[tuple[str, bool]],
    *,
    seconds: Mapping[str, float],
    asserted: int,
    outcome: str = "accuracy",
) -> EvictionResult:
    """Read a study's files and put all its tables together.

    Args:
        outcome: what policies are ranked by; of texts without right answers `agreement`, and nothing of answers.
        full: the full-cache run of each task.
        decodes: ways of decoding that were run in the engine: name, and whether the reference was forced.
    """
    offline = pd.read_parquet(folder / OFFLINE_FILE)
    protocols = list(dict.fromkeys(offline["protocol"]))
    heads = by_head(pd.read_parquet(folder / HEADS_FILE))
    by_request, served, sanity = _outcomes(folder, full, decodes, protocols)
    names = [*OUTCOMES, *FORCED_OUTCOMES]
    if outcome == "agreement":
        names = [n for n in names if n not in OF_ANSWERS]
    outcomes = {d: means(rows, names) for d, rows in by_request.items()}
    oracle = next((e.label for e in entries if e.kind == "oracle" and e.policy.name == "static_mean"), None)
    # The bound keeps what all others keep: beside another always-kept set it is none.
    mass_gaps = gaps(offline[offline["kind"] != "published"], "prompt_mass", oracle) if oracle else pd.DataFrame()
    predicted, pairs, points, outcome_gaps = (pd.DataFrame() for _ in range(4))
    protected = [protection(offline, PROTECTED_METRICS)]
    first = next((d for d, forced in decodes if not forced), None)
    if first is not None:
        rows = by_request[first]
        measures = (*PREDICTORS, *PREDICTORS_LOW)
        known = [m for m in measures if m in offline and offline[m].notna().any()]
        predicted = predictors(offline, rows, known, outcome)
        pairs = predictor_pairs(offline, rows, known, outcome)
        points = _points(offline, rows, known, outcome)
        outcome_gaps = _outcome_gaps(rows, outcome)
        protected.insert(0, protection(rows, [outcome]))
    if len(points):
        points.to_parquet(folder / POINTS_FILE)
    manifest = next(iter(full.values())).manifest
    return EvictionResult(
        name=name,
        config=config,
        manifest=manifest,
        policies=pd.DataFrame(listing(entries)),
        lengths=_lengths(offline),
        offline=means(offline, [m for m in METRICS if m in offline]),
        outcomes=outcomes,
        mass_gaps=mass_gaps,
        outcome_gaps=outcome_gaps,
        predictors=predicted,
        predictor_pairs=pairs,
        heads=heads,
        points=points,
        excluded=pd.read_parquet(folder / EXCLUDED_FILE),
        asserted=asserted,
        sanity=sanity,
        served=served,
        seconds=seconds,
        caveats=caveats(entries, int(manifest["model"]["layers"])),
        outcome=outcome,
        needed=needed_summary(pd.read_parquet(found)) if (found := folder / NEEDED_FILE).exists() else pd.DataFrame(),
        protection=pd.concat([p for p in protected if len(p)] or protected[:1], ignore_index=True),
    )


def _outcomes(
    folder: Path, full: Mapping[str, Run], decodes: Sequence[tuple[str, bool]], protocols: Sequence[str]
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame, Sanity | None]:
    """Outcomes per cell and prompt by way of decoding, what was served, and the sanity row."""
    found, served = {}, []
    sane: list[int] = []
    for decode, forced in decodes:
        parts = []
        for task, run in full.items():
            asked = pd.read_parquet(folder / f"{task}.{decode}.asked.parquet")
            evicted = load_run(folder / f"{task}.{decode}")
            outputs, sources = requests_of(evicted), requests_of(run)
            if forced:
                judged = forced_outcomes(asked, evicted, sources)
            else:
                judged = judge_outputs(asked, outputs, sources, sources)
                sane += [int(x) for x in _exact(judged, outputs, sources)]
            served.append(
                {
                    "task": task,
                    "decode": decode,
                    "asked": len(asked),
                    "failed": int(judged["failed"].sum()),
                    "truncated": int(judged["truncated"].sum()),
                    "kept_counts_asserted": check_served(asked, outputs),
                }
            )
            parts.append(with_full(judged, protocols))
        metrics = FORCED_OUTCOMES if forced else OUTCOMES
        found[decode] = over_repeats(pd.concat(parts, ignore_index=True), metrics)
    return found, pd.DataFrame(served), Sanity(len(sane), sum(sane)) if sane else None


def _exact(judged: pd.DataFrame, outputs: pd.DataFrame, sources: pd.DataFrame) -> list[bool]:
    """Of the sanity row and greedy full-cache requests, whether all tokens are those of the full-cache run."""
    mine = judged[judged["policy"].isin([ALL_KEPT, FULL_CACHE]) & (judged["temperature"] == 0)]
    produced, wanted = outputs.set_index("rid")["output_ids"], sources.set_index("rid")["output_ids"]
    return [list(produced.get(r.rid, [])) == list(wanted[r.source]) for r in mine.itertuples()]


def _outcome_gaps(rows: pd.DataFrame, outcome: str) -> pd.DataFrame:
    """The share of what eviction at random costs that a policy wins back: the bound is the full cache."""
    full = rows[rows["policy"] == FULL_CACHE].set_index(["task", "protocol", "rid"])[outcome].rename("full_cache")
    joined = rows[~rows["kind"].isin(["full", "published"])].join(full, on=["task", "protocol", "rid"])
    return gaps(joined, outcome, None, upper="full_cache")


def _points(offline: pd.DataFrame, rows: pd.DataFrame, metrics: Sequence[str], outcome: str) -> pd.DataFrame:
    cell = ["task", "protocol", "kind", "policy", "budget"]
    x = offline.groupby(cell, sort=False, as_index=False)[[*metrics]].mean()
    y = rows.groupby(cell, sort=False, as_index=False)[outcome].mean()
    return x.merge(y, on=cell)


def _lengths(offline: pd.DataFrame) -> pd.DataFrame:
    """b and b / L of each budget."""
    shape = offline.groupby(["task", "protocol", "budget"], sort=False)
    frame = shape.agg(prompts=("rid", "nunique"), L=("length", "mean"), b=("tokens", "mean")).reset_index()
    return frame.assign(share=frame["b"] / frame["L"])


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain data, numbers at four digits after the point, missing ones left out."""
    return [{k: v for k, v in row.items() if v is not None} for row in base.records(frame, digits=4)]
