"""The paired study: coverage of each arm, and the drift between arms beside the drift of an arm to itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ProbeError
from sglang_probe.ledger.check import Check
from sglang_probe.ledger.run import Run
from sglang_probe.ledger.verify import verify
from sglang_probe.study.coverage import coverage_by_position, coverage_by_segment, totals
from sglang_probe.study.drift import Compared, compare_runs, drift_table

EFFECT = "effect"
FLOOR = "floor"
_BIN = 32


@dataclass(frozen=True)
class PairResult:
    """Everything the report and the terminal show. All frames are tidy: one observation a row."""

    name: str
    totals: pd.DataFrame
    """One row per run: `coverage.totals` plus `run` and `arm`."""
    by_segment: pd.DataFrame
    """arm, segment, positions, computed, reused, coverage."""
    by_position: pd.DataFrame
    """arm, start, end, positions, computed, reused, coverage."""
    drift: pd.DataFrame
    """kind (effect | floor), comparison, and the columns of `drift_table`."""
    drift_by_position: pd.DataFrame
    """kind, comparison, hook_point, start, positions, l2_p99."""
    checks: dict[str, list[Check]]
    """Invariants of each run."""
    manifests: dict[str, dict[str, Any]]
    example: dict[str, Any]
    """One request for the strip figure: rid, segments, and spans (start, end, fate) per arm."""

    def drift_summary(self) -> pd.DataFrame:
        """Per hook point and phase, effect beside floor: lowest identical share and largest 99th percentile and maximum
        over the comparisons of each kind."""
        worst = self.drift.groupby(["hook_point", "phase", "kind"], sort=False).agg(
            identical=("identical", "min"), l2_p99=("l2_p99", "max"), l2_max=("l2_max", "max")
        )
        wide = worst.unstack("kind")
        wide.columns = [f"{kind} {column}" for column, kind in wide.columns]
        order = [f"{k} {c}" for c in ("identical", "l2_p99", "l2_max") for k in (EFFECT, FLOOR)]
        return wide[[c for c in order if c in wide.columns]].reset_index()

    @property
    def ok(self) -> bool:
        """Whether every invariant holds in every run."""
        return all(c.holds for checks in self.checks.values() for c in checks)


def study_pair(
    runs: Mapping[str, Run], arms: Mapping[str, str], name: str, *, tell: Callable[[str], None] = lambda _: None
) -> PairResult:
    """Compare the runs of an experiment.

    Args:
        runs: by name, in execution order; the first is the reference whose outputs the others were forced to.
        arms: arm of each run; the second run of an arm gives its floor.
        tell: called with what is being done.

    Raises:
        ProbeError: an arm did not produce the reference's output tokens, so that nothing can be compared.
    """
    tokens: dict[str, pd.DataFrame] = {}
    checks: dict[str, list[Check]] = {}
    for run_name, run in runs.items():
        tell(f"reading and verifying {run_name}")
        tokens[run_name] = run.tokens()
        checks[run_name] = verify(run)
    reference = next(iter(runs))
    for run_name in runs:
        _check_same_outputs(runs[reference], runs[run_name])

    firsts = list(dict.fromkeys(arms.values()))
    drift, by_position = [], []
    for kind, a, b in _comparisons(arms):
        tell(f"comparing {a} with {b}")
        label = f"{a} vs {b}"
        compared = compare_runs(runs[a], runs[b], tokens[a], tokens[b])
        drift.append(drift_table(compared).assign(kind=kind, comparison=label))
        by_position.append(_drift_by_position(compared).assign(kind=kind, comparison=label))
    return PairResult(
        name=name,
        totals=pd.DataFrame([{"run": n, "arm": arms[n], **totals(r, tokens[n])} for n, r in runs.items()]),
        by_segment=pd.concat([coverage_by_segment(tokens[a]).assign(arm=a) for a in firsts], ignore_index=True),
        by_position=pd.concat(
            [coverage_by_position(tokens[a], width=_BIN).assign(arm=a) for a in firsts], ignore_index=True
        ),
        drift=pd.concat(drift, ignore_index=True),
        drift_by_position=pd.concat(by_position, ignore_index=True),
        checks=checks,
        manifests={n: r.manifest for n, r in runs.items()},
        example=_example(runs, firsts),
    )


def write_summary(result: PairResult, path: Path) -> None:
    """The numbers of the study as one JSON file, for other programs and for committing."""
    data = {
        "name": result.name,
        "ok": result.ok,
        **{
            k: json.loads(getattr(result, k).to_json(orient="records"))
            for k in ("totals", "by_segment", "by_position", "drift")
        },
        "checks": {
            n: [{"name": c.name, "covered": c.covered, "unit": c.unit, "violation": c.violation} for c in cs]
            for n, cs in result.checks.items()
        },
        "versions": next(iter(result.manifests.values()))["versions"],
    }
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _comparisons(arms: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(kind, a, b): every arm against the last arm, and every arm's second run against its first."""
    firsts = {arm: run for run, arm in reversed(list(arms.items()))}
    names = list(dict.fromkeys(arms.values()))
    effects = [(EFFECT, firsts[a], firsts[names[-1]]) for a in names[:-1]]
    return effects + [(FLOOR, run, firsts[arm]) for run, arm in arms.items() if run != firsts[arm]]


def _check_same_outputs(a: Run, b: Run) -> None:
    left = a.requests().set_index("index")["output_ids"]
    right = b.requests().set_index("index")["output_ids"]
    for index, ids in left.items():
        other = right.get(index)
        if ids is None or other is None or not np.array_equal(ids, other):
            raise ProbeError(f"{b.path}: the output of request {index} differs from that of {a.path}")


def _drift_by_position(compared: Compared) -> pd.DataFrame:
    start = compared.positions["position"] // _BIN * _BIN
    frames = []
    for hook_point, l2 in compared.relative_l2.items():
        grouped = pd.Series(l2, index=compared.positions.index).groupby(start)
        frames.append(
            pd.DataFrame({"positions": grouped.size(), "l2_p99": grouped.quantile(0.99)})
            .rename_axis("start")
            .reset_index()
            .assign(hook_point=hook_point)
        )
    return pd.concat(frames, ignore_index=True)


def _example(runs: Mapping[str, Run], names: list[str]) -> dict[str, Any]:
    """The request with the largest reused share in the first arm: where a cached harvest is blindest."""
    spans = runs[names[0]].last_attempt()
    reused = spans[spans["status"] == "reused"]
    size = (reused["end"] - reused["start"]).groupby(reused["rid"]).sum()
    requests = runs[names[0]].requests()
    rid = size.idxmax() if len(size) else requests["rid"].iloc[0]
    request = requests.set_index("rid").loc[rid]
    strips = {}
    for name in names:
        run = runs[name]
        other = run.requests().set_index("index").loc[request["index"], "rid"]
        mine = run.last_attempt()
        mine = mine[mine["rid"] == other].sort_values("start")
        strips[name] = [
            (int(s.start), int(s.end), "decode" if s.phase in ("decode", "overshoot") else str(s.status))
            for s in mine.itertuples()
        ]
    segments = [(int(s["start"]), int(s["end"]), str(s["name"])) for s in request["segments"]]
    end = max(e for strip in strips.values() for _, e, _ in strip)
    segments.append((int(request["prompt_len"]), end, "generated"))
    return {"rid": rid, "segments": segments, "strips": strips}
