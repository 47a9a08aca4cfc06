"""The drift study of a run: every measure of every request and layer, and what they say together.

Intervals are over prompts (prefix families where there are any); layers, heads and steps are not independent of each
other and are never taken for a sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pandas as pd

from sglang_probe.attention.from_run import departs
from sglang_probe.attention.run_telemetry import captured_layers
from sglang_probe.errors import ProbeError, RunDirectoryError
from sglang_probe.run.run import Run
from sglang_probe.studies.query_drift import summary
from sglang_probe.studies.query_drift.captured import Captured, captured, centred_by_others, window_coverage
from sglang_probe.studies.query_drift.options import DriftOptions
from sglang_probe.studies.query_drift.tables import Tables, measure
from sglang_probe.verify.check import Check, all_hold
from sglang_probe.verify.verify import verify

MISSING_ROWS = "a position has no row: computed before the recording began, or not selected"
TOO_SHORT = "prompt too short for two windows"
TOO_FEW = "too few decode steps"
DEPARTS = "kept set, or RoPE positions of its own"


@dataclass(frozen=True)
class DriftResult:
    """Everything the report and the terminal show."""

    name: str
    options: DriftOptions
    layers: list[int]
    heads: int
    requests: int
    """Requests that were measured."""
    left_out: dict[str, int]
    """Requests that were not, by reason."""
    lengths: tuple[int, int]
    """Shortest and longest prompt."""
    steps: tuple[int, int]
    """Fewest and most decode steps."""
    rows: dict[str, pd.DataFrame]
    """Tidy rows by request and layer."""
    found: summary.Summary
    checks: dict[str, list[Check]]
    manifest: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether every invariant of the ledger holds."""
        return all_hold(self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the tables."""
        return {
            "name": self.name,
            "options": self.options.model_dump(mode="json"),
            "model": self.manifest["model"]["name"],
            "layers": self.layers,
            "heads": self.heads,
            "requests": self.requests,
            "left_out": self.left_out,
            "prompt_tokens": list(self.lengths),
            "decode_steps": list(self.steps),
            **self.found.to_json(),
            "versions": self.manifest["versions"],
        }

    def tables(self) -> dict[str, pd.DataFrame]:
        """Rows by request and layer, and as `means_<name>` what they say together."""
        rows = {name: frame.reset_index(drop=True) for name, frame in self.rows.items()}
        return rows | {f"means_{f.name}": getattr(self.found, f.name) for f in fields(self.found)}


def study_drift(
    run: Run,
    options: DriftOptions | None = None,
    *,
    layers: Sequence[int] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> DriftResult:
    """Measure a run.

    Raises:
        ProbeError: no layer has captured queries and keys, a layer that was asked for has none, or fewer than two
            requests can be measured.
    """
    o = options or DriftOptions()
    chosen = _layers(run, layers)
    tell("verifying the ledger")
    checks = verify(run)
    requests = run.requests()
    fitting, left_out = _fitting(requests, o)
    if len(fitting) < 2:
        raise ProbeError(
            f"{len(fitting)} of {len(requests)} requests can be measured ({dict(left_out)})",
            fix=f"prompts of {o.shortest_prompt} tokens and {o.fewest_steps} decode steps, or a shorter `--window`",
        )
    tables = Tables()
    heads = 0
    for layer in chosen:
        rids: list[str] = []
        bundles: list[Captured] = []
        for r in fitting.itertuples():
            try:
                bundles.append(captured(run, r.rid, layer, window=o.window, sinks=o.sinks))
                rids.append(r.rid)
            except RunDirectoryError:
                left_out[MISSING_ROWS] += layer == chosen[0]
        if len(bundles) < 2:
            raise ProbeError(
                f"no two requests of {run.path} have the rows of all their positions",
                fix="record without `rows`, from the start of the server",
            )
        bundles = centred_by_others(bundles)
        for i, (rid, c) in enumerate(zip(rids, bundles, strict=True)):
            tell(f"layer {layer}: {rid}")
            cover = window_coverage(run, rid, c.length, o.window)
            measure(tables, rid, layer, c, bundles[i - 1], cover, o)
            heads = c.decode_pre_THD.shape[1]
    frames = tables.frames()
    measured = requests[requests["rid"].isin(set(frames["coverage"]["rid"]))]
    clusters = dict(zip(measured["rid"], measured["family"].fillna(measured["rid"]), strict=True))
    return DriftResult(
        name=str(run.manifest.get("name", run.path.name)),
        options=o,
        layers=chosen,
        heads=heads,
        requests=len(measured),
        left_out={k: v for k, v in left_out.items() if v},
        lengths=(int(measured["prompt_len"].min()), int(measured["prompt_len"].max())),
        steps=(int(measured["output_len"].min()) - 1, int(measured["output_len"].max()) - 1),
        rows=frames,
        found=summary.summarise(frames, clusters, o),
        checks={run.path.name: checks},
        manifest=run.manifest,
    )


def _layers(run: Run, layers: Sequence[int] | None) -> list[int]:
    there = captured_layers(run)
    if missing := sorted(set(layers or ()) - set(there)):
        raise ProbeError(f"{run.path} has no queries and keys of layer {missing[0]}", fix=f"captured: {there}")
    if not there:
        raise ProbeError(
            f"{run.path} has no layer with captured queries and keys",
            fix="record `blocks.<layer>.attn.hook_rot_q` and `blocks.<layer>.attn.hook_rot_k`",
        )
    return sorted(layers or there)


def _fitting(requests: pd.DataFrame, o: DriftOptions) -> tuple[pd.DataFrame, Counter[str]]:
    other = pd.Series([departs(r) is not None for _, r in requests.iterrows()], index=requests.index, dtype=bool)
    short = ~other & (requests["prompt_len"] < o.shortest_prompt)
    few = ~other & ~short & (requests["output_len"] - 1 < o.fewest_steps)
    left_out = {TOO_SHORT: int(short.sum()), TOO_FEW: int(few.sum())}
    if other.any():
        left_out[DEPARTS] = int(other.sum())
    return requests[~other & ~short & ~few], Counter(left_out)
