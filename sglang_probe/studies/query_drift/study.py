"""The drift study of a run: every measure of every request and layer, and what they say together.

Intervals are over prompts (prefix families where there are any); layers, heads and steps are not independent of each
other and are never taken for a sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.attention.from_run import departs
from sglang_probe.attention.run_telemetry import captured_layers
from sglang_probe.errors import ProbeError
from sglang_probe.run.run import Run
from sglang_probe.studies.partials import Partials, identity
from sglang_probe.studies.query_drift import summary
from sglang_probe.studies.query_drift.by_layer import ByLayer
from sglang_probe.studies.query_drift.options import DriftOptions
from sglang_probe.studies.workers import compute
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
    output: Path | None = None,
    resume: bool = False,
    processes: int = 1,
    tell: Callable[[str], None] = lambda _: None,
) -> DriftResult:
    """Measure a run.

    Args:
        layers: None: all captured ones.
        output: folder of the study, where each layer is kept as soon as it is finished; None: nothing is kept.
        resume: take up the layers that are kept there, of the same run, options and code.
        processes: layers that are computed side by side. With more than 1 a script needs `if __name__ == "__main__":`,
            as everywhere in Python where processes are started.

    Raises:
        ProbeError: no layer has captured queries and keys, a layer that was asked for has none, or fewer than two
            requests can be measured.
    """
    o = options or DriftOptions()
    chosen = _layers(run, layers)
    tell("verifying the ledger")
    checks = verify(run)
    depends_on = {"run": identity(run), "options": o.model_dump(mode="json")}
    # What the manifest says of files that are others now cannot say whether a kept layer is theirs.
    partials = Partials(output, depends_on, resume=resume and all_hold({"": checks}))
    requests = run.requests()
    fitting, left_out = _fitting(requests, o)
    if len(fitting) < 2:
        raise ProbeError(
            f"{len(fitting)} of {len(requests)} requests can be measured ({dict(left_out)})",
            fix=f"prompts of {o.shortest_prompt} tokens and {o.fewest_steps} decode steps, or a shorter `--window`",
        )
    found = _layers_found(run, tuple(map(str, fitting["rid"])), chosen, o, partials, processes, tell)
    frames = {name: pd.concat([tables[name] for tables in found], ignore_index=True) for name in found[0]}
    left_out[MISSING_ROWS] = len(fitting) - found[0]["coverage"]["rid"].nunique()
    measured = requests[requests["rid"].isin(set(frames["coverage"]["rid"]))]
    clusters = dict(zip(measured["rid"], measured["family"].fillna(measured["rid"]), strict=True))
    return DriftResult(
        name=str(run.manifest.get("name", run.path.name)),
        options=o,
        layers=chosen,
        heads=int(frames["steps"]["head"].max()) + 1,
        requests=len(measured),
        left_out={k: v for k, v in left_out.items() if v},
        lengths=(int(measured["prompt_len"].min()), int(measured["prompt_len"].max())),
        steps=(int(measured["output_len"].min()) - 1, int(measured["output_len"].max()) - 1),
        rows=frames,
        found=summary.summarise(frames, clusters, o),
        checks={run.path.name: checks},
        manifest=run.manifest,
    )


def _layers_found(
    run: Run,
    rids: tuple[str, ...],
    layers: Sequence[int],
    o: DriftOptions,
    partials: Partials,
    processes: int,
    tell: Callable[[str], None],
) -> list[dict[str, pd.DataFrame]]:
    """The tables of each layer, in order: kept ones, and those that are computed now."""
    found = {layer: kept for layer in layers if (kept := partials.read(_piece(layer))) is not None}
    todo = [layer for layer in layers if layer not in found]
    started = len(found)

    def told(documents: int) -> None:
        kept = f" ({started} kept)" if started else ""
        tell(
            f"{len(found)} of {len(layers)} layers{kept}, {documents:,} of {len(todo) * len(rids):,} documents of the "
            "others"
        )

    told(0)
    for layer, tables in compute(todo, ByLayer(run.path, rids, o), processes=processes, advance=told):
        partials.write(_piece(layer), tables)
        found[layer] = tables
    return [found[layer] for layer in layers]


def _piece(layer: int) -> str:
    return f"layer-{layer:03d}"


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
