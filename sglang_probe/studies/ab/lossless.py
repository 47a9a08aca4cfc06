"""Lossless harvesting: the rows that a cached run gathers through lineage, against those of a run without cache.

Three distances stand side by side: gathered against computed, a run against itself, and a cache-off run against one
whose prefill is cut elsewhere. All are between runs in different orders, because a run has nothing in its own order to
be compared with itself; the distances in the same order stand beside them, and have no floor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ProbeError
from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.studies.base import records
from sglang_probe.studies.drift import compare_runs
from sglang_probe.verify.check import Check

HERE = "computed by the request"
GATHERED = "gathered from another request"
DECODED = "decoded"


@dataclass(frozen=True)
class LosslessResult:
    """`coverage` has one row per run, `distance` one per pair of runs, hook point and kind of position in the cached
    run of the first one's replicate; `order` says whether the two submitted the requests in the `same` order or in
    `another`."""

    name: str
    cached: str
    """The arm that reuses positions."""
    reference: str
    """The arm that it is compared with."""
    coverage: pd.DataFrame
    distance: pd.DataFrame
    speedup: list[float]
    """Serving time without cache over serving time with it, replicate by replicate."""
    manifest: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every position of the cached runs has a row."""
        runs = self.coverage
        return bool((runs.loc[runs["arm"] == self.cached, "covered"] == 1).all())

    @property
    def checks(self) -> dict[str, list[Check]]:
        """None: `sglang-probe ab` has checked the runs."""
        return {}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "cached": self.cached,
            "reference": self.reference,
            "coverage": records(self.coverage),
            "distance": records(self.distance),
            "speedup": self.speedup,
            "versions": self.manifest["versions"],
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """Both tables."""
        return {"coverage": self.coverage, "distance": self.distance}


def study_lossless(arms: Mapping[str, Sequence[Run]], name: str = "lossless") -> LosslessResult:
    """Study the runs of an experiment, by arm and in the order of their replicates.

    The cached arm is the first with reused positions; the reference is the first without; all others without reuse are
    floors.

    Raises:
        ProbeError: there is no arm of either kind, or no rows were captured.
    """
    tokens = {id(run): _labelled(run) for runs in arms.values() for run in runs}
    reuses = {name: any((tokens[id(r)]["label"] == GATHERED).any() for r in runs) for name, runs in arms.items()}
    cached = next((name for name in arms if reuses[name]), None)
    computed = [name for name in arms if not reuses[name]]
    if cached is None or not computed:
        raise ProbeError(
            "this needs an arm that reuses positions and one that reuses none",
            fix="name arms with `cache: on` and `cache: off`",
        )
    reference = arms[computed[0]]
    if not reference[0].hook_points:
        raise ProbeError("no rows were captured", fix="record with `hook_points`")
    pairs = []
    for n in arms:
        what = f"{n} against {computed[0]}"
        if n != computed[0]:
            crossed = product(enumerate(arms[n]), enumerate(reference))
            pairs += [(what, i, j, mine, other) for (i, mine), (j, other) in crossed]
        if n in (computed[0], cached):
            both = combinations(enumerate(arms[n]), 2)
            pairs += [(f"{n} against itself", i, j, other, mine) for (i, mine), (j, other) in both]
    kinds = [_kinds(run, tokens[id(run)]) for run in arms[cached]]
    coverage = [_coverage(run, tokens[id(run)]) | {"arm": arm} for arm, runs in arms.items() for run in runs]
    return LosslessResult(
        name=name,
        cached=cached,
        reference=computed[0],
        coverage=pd.DataFrame(coverage),
        distance=pd.concat(
            [
                _distance(what, a, b, kinds[i]).assign(order="same" if i == j else "another")
                for what, i, j, a, b in pairs
            ],
            ignore_index=True,
        ),
        speedup=[_seconds(off) / _seconds(on) for on, off in zip(arms[cached], reference, strict=False)],
        manifest=arms[cached][0].manifest,
    )


def _labelled(run: Run) -> pd.DataFrame:
    """Positions with the row that holds their activation, wherever it was computed, as `row`."""
    return _label(run.tokens())


def _label(tokens: pd.DataFrame) -> pd.DataFrame:
    tokens = tokens[tokens["phase"] != schema.OVERSHOOT]
    reused = tokens["status"] == schema.REUSED
    label = np.where(reused, GATHERED, np.where(tokens["phase"] == schema.DECODE, DECODED, HERE))
    phase = np.where(label == DECODED, schema.DECODE, schema.PREFILL)
    return tokens.assign(own_row=tokens["row"], row=tokens["source_row"], label=label, phase=phase, segment=label)


def _coverage(run: Run, tokens: pd.DataFrame) -> dict[str, Any]:
    return {
        "run": run.path.name,
        "positions": len(tokens),
        "computed": int((tokens["label"] != GATHERED).sum()),
        "rows": int((tokens["own_row"] >= 0).sum()),
        "covered": float((tokens["row"] >= 0).mean()),
        "seconds": _seconds(run),
    }


def _kinds(run: Run, tokens: pd.DataFrame) -> pd.Series:
    """How the cached run came by the row of each position, by request index and position."""
    index = run.requests().set_index("rid")["index"]
    keys = [tokens["rid"].map(index), tokens["position"]]
    return pd.Series(tokens["label"].to_numpy(), index=pd.MultiIndex.from_arrays(keys))


def _distance(what: str, a: Run, b: Run, kinds: pd.Series) -> pd.DataFrame:
    """Relative L2 of rows by hook point, and by how the cached run of the replicate came by its row of the position: so
    that an effect and its floors are taken over the same positions."""
    compared = compare_runs(a, b, prepare=_label)
    where = pd.MultiIndex.from_frame(compared.positions[["index", "position"]])
    kind = kinds.reindex(where).to_numpy()
    rows = []
    for hook_point, l2 in compared.relative_l2.items():
        for label in (HERE, GATHERED, DECODED):
            values = l2[kind == label]
            if len(values):
                rows.append(
                    {
                        "comparison": what,
                        "runs": f"{a.path.name}, {b.path.name}",
                        "hook_point": hook_point,
                        "positions": label,
                        "n": len(values),
                        "identical": float((values == 0).mean()),
                        "l2_median": float(np.median(values)),
                        "l2_p99": float(np.quantile(values, 0.99)),
                        "l2_max": float(values.max()),
                    }
                )
    return pd.DataFrame(rows)


def _seconds(run: Run) -> float:
    """Time in which requests were served, over all engine processes of the run; NaN if one was killed."""
    seconds = [s["seconds"] for s in schema.starts_of(run.manifest)]
    return float("nan") if None in seconds else float(sum(seconds))
