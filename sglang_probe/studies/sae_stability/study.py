"""How far does a dictionary move when the policy of its harvest changes, beside what moves it anyway?

Four distances of a dictionary to the reference's (1 minus the mean cosine of the best matching of alive latents):
the policy's, and of another recording of the same policy (`repeat`), of the same rows in another order of batches
(`order`), and of another initialisation (`seed`). The first two and the policy share initialisation and batches.
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
from sglang_probe.sae.evaluation import Evaluation, evaluate
from sglang_probe.sae.keys import coverage
from sglang_probe.sae.manifest import facts_of_run
from sglang_probe.sae.match import compare, cosine_by_index
from sglang_probe.sae.sae import SAE
from sglang_probe.stats.intervals import mean_intervals
from sglang_probe.studies.base import Tell
from sglang_probe.studies.lessons import curves, read_lessons
from sglang_probe.studies.sae_stability.config import ORDER, REPEAT, SaeStabilityConfig
from sglang_probe.studies.sae_stability.runs import Rows, read_rows, wanted
from sglang_probe.studies.sae_train.study import labels
from sglang_probe.verify.check import Check, all_hold
from sglang_probe.verify.verify import verify

Array = np.ndarray[Any, Any]
SEED = "seed"
FLOORS = (REPEAT, ORDER, SEED)


@dataclass(frozen=True)
class StabilityResult:
    """What was found."""

    name: str
    of: Mapping[str, Any]
    checks: Mapping[str, Sequence[Check]]
    pairs: pd.DataFrame
    """Every comparison with the reference: `dictionary` (of the study, or `repeat`, `order`, `seed`), `seed`, the
    columns of `sae.match.compare`, `distance` (1 - `mcc`), and `same_index` (median cosine of latents of one number;
    NaN between seeds)."""
    distances: pd.DataFrame
    """By `dictionary`: means over seeds, `distance_low` and `distance_high` (least and most of a seed), and `of_order`
    (distance over that of another order)."""
    coverage: pd.DataFrame
    """`sae.keys.coverage` of the keys that are trained on."""
    fvu: pd.DataFrame
    """By `dictionary`, `axis` and `group` of held-out rows: `fvu` (of one variance), mean over seeds, `more` (than the
    reference's, paired by family) with interval."""
    own: pd.DataFrame
    """By `dictionary`: `fvu` on its own harvest's held-out rows beside the reference's dictionary there."""
    curve: pd.DataFrame

    @property
    def ok(self) -> bool:
        """Every invariant of every run holds."""
        return all_hold(self.checks)

    def to_json(self) -> dict[str, Any]:
        """All but the learning curves."""
        names = ("distances", "pairs", "coverage", "fvu", "own")
        return {"name": self.name, "of": dict(self.of), **{n: getattr(self, n).to_dict("records") for n in names}}

    def tables(self) -> Mapping[str, pd.DataFrame]:
        """All of it."""
        return {n: getattr(self, n) for n in ("distances", "pairs", "coverage", "fvu", "own", "curve")}


def study_stability(
    runs: Mapping[str, Run], config: SaeStabilityConfig, folder: Path, name: str, tell: Tell = lambda _: None
) -> StabilityResult:
    """Judge and match the dictionaries of a study.

    Raises:
        RunDirectoryError: a dictionary is missing.
    """
    names = wanted(config)
    saes = read_lessons(folder, [n for n, _, _ in names])
    by_kind = {(kind, seed): saes[n] for n, kind, seed in names}
    tell("reading rows")
    rows = read_rows(config, runs)
    groups = labels(rows.held_out)
    judged = {}
    for key, sae in by_kind.items():
        tell(f"judging {key[0]}, seed {key[1]}")
        judged[key] = evaluate(sae, rows.held_out.batches(), groups=groups)
    checks = {}
    for run_name, run in runs.items():
        tell(f"verifying {run_name}")
        checks[run_name] = verify(run)
    tell("matching")
    pairs = matched(by_kind, {k: e.fired > 0 for k, e in judged.items()}, config.reference)
    model = runs[config.reference].manifest["model"]
    of = {
        "model": {k: model.get(k) for k in ("name", "architecture", "layers")},
        "config": config.trained(),
        "reference": config.reference,
        "dictionaries": {n: d.model_dump() for n, d in config.compared.items()},
        "runs": {n: facts_of_run(r)["manifest_sha256"] for n, r in runs.items()},
        "keys": len(rows.keys),
        "rows_held_out": len(rows.held_out),
        "families_held_out": int(rows.held_out.tokens["family"].nunique()),
        "left_out": rows.reference.left_out.to_dict("records"),
    }
    return StabilityResult(
        name,
        of,
        checks,
        pairs,
        distances(pairs, config.reference),
        coverage(rows.keys, rows.harvests, rows.harvests[config.reference]),
        by_group(judged, groups, rows.held_out.tokens["family"].to_numpy(), config),
        on_own_rows(by_kind, rows, config),
        pd.DataFrame(curves(folder, [n for n, _, _ in names])),
    )


def matched(
    saes: Mapping[tuple[str, int], SAE], alive: Mapping[tuple[str, int], Array], reference: str
) -> pd.DataFrame:
    """Every dictionary against the reference's of the same seed, and the reference's seeds against each other."""
    seeds = [seed for kind, seed in saes if kind == reference]
    asked = [(kind, seed, (reference, seed), (kind, seed)) for kind, seed in saes if kind != reference]
    asked += [(SEED, b, (reference, a), (reference, b)) for a, b in combinations(seeds, 2)]
    found = []
    for kind, seed, first, second in asked:
        row = compare(saes[first], saes[second], alive[first], alive[second])
        both = np.flatnonzero(alive[first] & alive[second])
        index = float("nan")
        if kind != SEED and len(both):
            index = float(cosine_by_index(saes[first], saes[second], both)["decoder"].median())
        found.append({"dictionary": kind, "seed": seed, "distance": 1 - row["mcc"], **row, "same_index": index})
    return pd.DataFrame(found)


def distances(pairs: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Means over seeds by dictionary, the policies before the floors, and each distance over that of the order."""
    order = [n for n in dict.fromkeys(pairs["dictionary"]) if n not in FLOORS] + list(FLOORS)
    grouped = pairs.groupby("dictionary", sort=False)
    columns = ["distance", "mcc", "mcc_chance", "mcc_encoder", "shared", "above_0.7", "same_index", "alive_second"]
    frame = grouped[columns].mean()
    frame["distance_low"], frame["distance_high"] = grouped["distance"].min(), grouped["distance"].max()
    base = float(frame.loc[ORDER, "distance"]) if ORDER in frame.index else float("nan")
    frame["of_order"] = frame["distance"] / base if base > 0 else float("nan")
    return frame.loc[[n for n in order if n in frame.index]].reset_index()


def by_group(
    judged: Mapping[tuple[str, int], Evaluation], groups: Mapping[str, Any], family_N: Array, config: SaeStabilityConfig
) -> pd.DataFrame:
    """FVU of every dictionary by kind of row, and by how much it is more than the reference's, over families."""
    variance = judged[(config.reference, config.seeds[0])].variance
    kinds = list(dict.fromkeys(kind for kind, _ in judged))
    error = {k: np.mean([judged[(k, s)].rows["error"].to_numpy() for s in config.seeds], 0) / variance for k in kinds}
    l0 = {k: np.mean([judged[(k, s)].rows["active"].to_numpy() for s in config.seeds], 0) for k in kinds}
    families = pd.factorize(family_N)[0]
    found = []
    for axis, values in {"all": np.full(len(family_N), "all"), **groups}.items():
        codes, names = pd.factorize(np.asarray(values, dtype=object))
        for code, group in enumerate(names):
            here = codes == code
            n = np.bincount(families[here])
            for kind in kinds:
                apart = (error[kind] - error[config.reference])[here]
                by_family = np.bincount(families[here], weights=apart)[n > 0] / n[n > 0]
                more = mean_intervals(by_family[:, None])
                row = {"dictionary": kind, "axis": axis, "group": str(group), "rows": int(here.sum())}
                row |= {"fvu": error[kind][here].mean(), "l0": l0[kind][here].mean()}
                ends = {"more": more.estimate, "more_low": more.low, "more_high": more.high}
                found.append({**row, **{k: float(v[0]) for k, v in ends.items()}})
    return pd.DataFrame(found)


def on_own_rows(saes: Mapping[tuple[str, int], SAE], rows: Rows, config: SaeStabilityConfig) -> pd.DataFrame:
    """Each dictionary on held-out rows of its own harvest, and the reference's dictionary on the same rows."""
    found = []
    for name, (keyed, _) in rows.held_out_of.items():
        keys = np.flatnonzero(keyed.has)
        if name == config.reference or len(keys) < 2:
            continue
        x = keyed.rows(keys)
        fvu = [[evaluate(saes[(k, s)], x).fvu for s in config.seeds] for k in (name, config.reference)]
        found.append([name, len(keys), float(np.mean(fvu[0])), float(np.mean(fvu[1]))])
    return pd.DataFrame(found, columns=["dictionary", "rows", "fvu", "fvu_of_the_reference"])
