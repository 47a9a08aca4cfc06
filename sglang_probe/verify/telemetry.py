"""Whether the attention telemetry of a run has the steps that were to be measured, and numbers that fit together."""

from __future__ import annotations

import numpy as np
import pandas as pd

from sglang_probe.run import schema
from sglang_probe.run import tokens as positions
from sglang_probe.run.run import Run
from sglang_probe.run.telemetry import KEY, options_of
from sglang_probe.run.telemetry_options import REGIONS
from sglang_probe.verify.check import Check


def telemetry_holds(run: Run) -> Check:
    """Every decode step that was to be measured was, once a layer, by the forward that computed it; and the numbers of
    a step fit together."""
    name = "telemetry"
    claim = "each measured decode step has one row a layer, of the forward that computed it; its weights sum to 1"
    options = options_of(run)
    spans = run.spans()
    steps = positions.expand(spans[(spans["status"] == schema.COMPUTED) & spans["phase"].isin(schema.STEP_PHASES)])
    table = run.telemetry_table()
    step = steps["position"].to_numpy() - positions.prompt_lengths(run, steps["rid"])
    known = positions.prompt_lengths(run, steps["rid"]) >= 0
    due = steps[known & (step % options.every == 0)]
    mine = table[positions.prompt_lengths(run, table["rid"]) >= 0]
    expected = pd.MultiIndex.from_frame(due[KEY[1:]])
    unknown = int((~known).sum())
    note = f"{unknown} steps of requests of unknown prompt length were not asked" if unknown else None
    layers = run.manifest["telemetry_layers"]
    for layer in layers:
        found = pd.MultiIndex.from_frame(mine.loc[mine["layer"] == layer, KEY[1:]])
        for index, what in (
            (found[found.duplicated()], "is there twice"),
            (found.difference(expected), "was not due"),
            (expected.difference(found), "is missing"),
        ):
            if len(index):
                rid, attempt, position, forward = index[0]
                violation = f"layer {layer}: {rid} attempt {attempt} position {position} (forward {forward}) {what}"
                return Check(name, claim, len(mine), "rows", violation, note)
    return Check(name, claim, len(mine), "rows", _top_fits(mine, options.top_k) or _numbers_fit(mine), note)


def _top_fits(table: pd.DataFrame, top_k: int) -> str | None:
    """Each head lists as many positions as the manifest says."""
    for column in ("top_positions", "top_weights"):
        wrong = table[column].map(len) != table["entropy"].map(len) * top_k
        if wrong.any():
            r = table[wrong].iloc[0]
            return f"layer {r['layer']}: {r['rid']} position {r['position']}: {column} does not have {top_k} a head"
    return None


def _numbers_fit(table: pd.DataFrame) -> str | None:
    if table.empty:
        return None
    masses = np.stack([np.stack(table[f"mass_{r}"].to_list()) for r in REGIONS])  # [region, rows, heads]
    wrong = {
        "weights do not sum to 1": np.abs(np.nansum(masses, 0) - 1).max(1) > 1e-4,
        "weight is negative": np.nanmin(masses, axis=(0, 2)) < -1e-4,
        "entropy is not within 0 and 1": np.stack(table["entropy"].to_list()).max(1) > 1 + 1e-4,
    }
    top = np.stack(table["top_positions"].to_list())
    wrong["a top position lies past the step"] = top.max(1, initial=-1) > table["position"].to_numpy()
    for what, bad in wrong.items():
        if bad.any():
            r = table.iloc[int(np.argmax(bad))]
            return f"layer {r['layer']}: {r['rid']} position {r['position']}: {what}"
    return None
