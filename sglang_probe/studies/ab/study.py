"""The study of arms: coverage of each arm, and the drift between arms beside the drift of an arm to itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import ProbeError
from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.studies.base import records
from sglang_probe.studies.coverage.prompts import PromptCoverage, totals
from sglang_probe.studies.drift import Compared, compare_runs, drift_table, first_divergence, in_common
from sglang_probe.studies.floor import MARGIN, cell_sums, comparisons, floor_table
from sglang_probe.verify.check import Check, all_hold
from sglang_probe.verify.verify import verify

BIN = 32
"""Positions in a bin."""

MOST_REQUESTS = 8
"""So many requests are shown under each other."""


@dataclass(frozen=True)
class AbResult:
    """Everything the report and the terminal show. All frames are tidy: one observation a row."""

    name: str
    totals: pd.DataFrame
    """One row per run: `coverage.totals` plus `run` and `arm`."""
    by_segment: pd.DataFrame
    """arm, segment, positions, computed, reused, coverage."""
    by_position: pd.DataFrame
    """arm, start, end, positions, computed, reused, coverage."""
    baseline: str
    """The arm that the others are compared with."""
    drift: pd.DataFrame
    """kind (effect | floor | same order), arm, comparison, and the columns of `drift_table`, over all positions that
    the two runs share."""
    floors: pd.DataFrame
    """Effect beside floor per arm, hook point and phase, over the positions that all runs of the two arms share
    (`sglang_probe.studies.floor.floor_table`)."""
    by_class: pd.DataFrame
    """The same per segment of the prompt, or `generated`."""
    by_bin: pd.DataFrame
    """The same per bin of positions, which begins at `start`."""
    flips: pd.DataFrame
    """Where outputs were not forced: per comparison the share of requests whose outputs part, and where."""
    checks: dict[str, list[Check]]
    """Invariants of each run."""
    manifests: dict[str, dict[str, Any]]
    example: dict[str, Any]
    """For the strips: `rid`, its `segments`, and its spans (start, end, fate) per arm as `strips`; `arm`, the one that
    reuses most, whether it `reuses` anything, and spans of several `requests` in it, of one family if `related`."""

    @property
    def ok(self) -> bool:
        """Whether every invariant holds in every run."""
        return all_hold(self.checks)

    @property
    def reconciled(self) -> str:
        """How many requests have the reused count that SGLang reports, in words."""
        if self.totals.empty:
            return "No request was recorded."
        equal, requests = int(self.totals["requests_reconciled"].sum()), int(self.totals["requests"].sum())
        return f"The reused count equals SGLang's `cached_tokens` in {equal} of {requests} requests."

    def to_json(self) -> dict[str, Any]:
        """The summary, for other programs and for committing."""
        frames = ("totals", "by_segment", "by_position", "drift", "floors", "by_class", "flips")
        return {
            "name": self.name,
            "baseline": self.baseline,
            **{k: records(getattr(self, k)) for k in frames},
            "checks": {
                n: [{"name": c.name, "covered": c.covered, "unit": c.unit, "violation": c.violation} for c in cs]
                for n, cs in self.checks.items()
            },
            "versions": next(iter(self.manifests.values()))["versions"],
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """Everything that the report prints, at full precision."""
        names = ("totals", "by_segment", "by_position", "drift", "floors", "by_class", "by_bin", "flips")
        return {k: getattr(self, k) for k in names}


def study_ab(
    runs: Mapping[str, Run],
    arms: Mapping[str, str],
    name: str,
    *,
    baseline: str | None = None,
    margin: float = MARGIN,
    tell: Callable[[str], None] = lambda _: None,
) -> AbResult:
    """Compare the runs of an experiment.

    Args:
        runs: by name, in execution order; the first is the reference whose outputs the others were forced to.
        arms: arm of each run; further runs of an arm give its floor.
        baseline: the arm that the others are compared with; None: the first.
        margin: by how much an effect may exceed the floor and still be called equivalent.
        tell: called with what is being done.

    Raises:
        ProbeError: an arm did not produce the reference's output tokens, so that nothing can be compared.
    """
    firsts = list(dict.fromkeys(arms.values()))
    prompts: dict[str, PromptCoverage] = {}
    checks: dict[str, list[Check]] = {}
    for run_name, run in runs.items():
        tell(f"reading and verifying {run_name}")
        if run_name in firsts:
            prompts[run_name] = PromptCoverage(run.iter_tokens(), width=BIN)
        checks[run_name] = verify(run)
    reference = next(iter(runs))
    forced = any(run.manifest.get("forced_from") for run in runs.values())
    if forced:
        for run_name in runs:
            _check_same_outputs(runs[reference], runs[run_name])

    baseline = baseline or arms[reference]
    drift: list[pd.DataFrame] = []
    sums: dict[str, list[pd.DataFrame]] = {"all": [], "segment": [], "start": []}
    flips = []
    floors: dict[tuple[str, str], Compared] = {}
    """Of the baseline: every arm has them beside it."""
    planned = comparisons(dict(arms), baseline)
    for arm in dict.fromkeys(c.beside for c in planned):
        mine = [c for c in planned if c.beside == arm]
        found: list[Compared] = []
        for c in mine:
            known = floors.get((c.a, c.b))
            if known is None:
                tell(f"comparing {c.a} with {c.b}")
                until = None if forced else first_divergence(runs[c.a], runs[c.b])
                known = compare_runs(runs[c.a], runs[c.b], until=until)
                what = {"kind": c.kind, "arm": c.arm, "comparison": c.label}
                drift.append(drift_table(known).assign(**what))
                known = replace(known, cosine={}, deviation={})  # the table has all that is asked of them
                if until is not None:
                    flips.append({**what, **_flips(runs[c.b], until)})
                if c.arm == baseline:
                    floors[c.a, c.b] = known
            found.append(known)
        for c, compared in zip(mine, in_common(found), strict=True):
            positions = compared.positions.assign(start=compared.positions["position"] // BIN * BIN)
            for key, parts in sums.items():
                by = () if key == "all" else (key,)
                parts.append(cell_sums(positions, compared.relative_l2, by).assign(**c.columns))
    tables = {
        key: floor_table(
            pd.concat(parts, ignore_index=True), baseline, by=() if key == "all" else (key,), margin=margin
        )
        for key, parts in sums.items()
    }
    return AbResult(
        name=name,
        totals=pd.DataFrame([{"run": n, "arm": arms[n], **totals(r)} for n, r in runs.items()]),
        by_segment=pd.concat([prompts[a].by_segment().assign(arm=a) for a in firsts], ignore_index=True),
        by_position=pd.concat([prompts[a].by_position().assign(arm=a) for a in firsts], ignore_index=True),
        baseline=baseline,
        drift=pd.concat(drift, ignore_index=True),
        floors=tables["all"],
        by_class=tables["segment"],
        by_bin=tables["start"],
        flips=pd.DataFrame(flips),
        checks=checks,
        manifests={n: r.manifest for n, r in runs.items()},
        example=_example(runs, firsts),
    )


def _check_same_outputs(a: Run, b: Run) -> None:
    left = a.requests().set_index("index")["output_ids"]
    right = b.requests().set_index("index")["output_ids"]
    for index, ids in left.items():
        other = right.get(index)
        if ids is None or other is None or not np.array_equal(ids, other):
            raise ProbeError(f"{b.path}: the output of request {index} differs from that of {a.path}")


def _flips(reference: Run, until: pd.Series) -> dict[str, Any]:
    """How many requests got other tokens, and after how many output tokens.

    Args:
        until: of `first_divergence`, by request index.
    """
    requests = reference.requests().set_index("index").loc[until.index]
    agreed = until - requests["prompt_len"]
    parted = agreed < requests["output_len"]
    return {
        "requests": len(until),
        "parted": int(parted.sum()),
        "tokens_before_median": float(agreed[parted].median()) if parted.any() else float("nan"),
        "tokens_before_min": float(agreed[parted].min()) if parted.any() else float("nan"),
    }


def _example(runs: Mapping[str, Run], names: list[str]) -> dict[str, Any]:
    """The request with the most reused positions, in the arm that reuses most: where a cached harvest is blindest; and
    requests of its family beside it."""
    spans = {name: runs[name].last_attempt() for name in names}
    asked = {name: runs[name].requests() for name in names}
    reused = {name: _reused(spans[name]) for name in names}
    arm = max(names, key=lambda name: reused[name].sum())
    requests = asked[arm]
    rid = reused[arm].idxmax() if len(reused[arm]) else requests["rid"].iloc[0]
    request = requests.set_index("rid").loc[rid]
    family = requests[requests["family"] == request["family"]]
    related = len(family) > 1
    shown = (family if related else requests).sort_values("index").head(MOST_REQUESTS)
    strips = {name: _strip(spans[name], asked[name], int(request["index"])) for name in names}
    segments = [(int(s["start"]), int(s["end"]), str(s["name"])) for s in request["segments"]]
    end = max([e for strip in strips.values() for _, e, _ in strip], default=0)
    if end > request["prompt_len"]:
        segments.append((int(request["prompt_len"]), end, "generated"))
    return {
        "rid": rid,
        "arm": arm,
        "reuses": bool(reused[arm].sum()),
        "related": related,
        "segments": segments,
        "strips": strips,
        "requests": {f"request {i}": _strip(spans[arm], requests, i) for i in map(int, shown["index"])},
    }


def _reused(spans: pd.DataFrame) -> pd.Series:
    """Reused positions by rid."""
    spans = spans[spans["status"] == schema.REUSED]
    return (spans["end"] - spans["start"]).groupby(spans["rid"]).sum()


def _strip(spans: pd.DataFrame, requests: pd.DataFrame, index: int) -> list[tuple[int, int, str]]:
    """Spans of a request as a strip shows them: neighbours of one fate are one."""
    mine = spans[spans["rid"].isin(requests.loc[requests["index"] == index, "rid"])].sort_values("start")
    strip: list[tuple[int, int, str]] = []
    for s in mine.itertuples():
        fate = "decode" if s.phase in (schema.DECODE, schema.OVERSHOOT) else str(s.status)
        if strip and strip[-1][1:] == (s.start, fate):
            strip[-1] = (strip[-1][0], int(s.end), fate)
        else:
            strip.append((int(s.start), int(s.end), fate))
    return strip
