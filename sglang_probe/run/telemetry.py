"""Reading and checking the attention telemetry that was recorded while requests were served."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run import schema
from sglang_probe.run import tokens as positions
from sglang_probe.run.run import Run
from sglang_probe.run.telemetry_options import NUMBERS, REGIONS, TelemetryConfig
from sglang_probe.verify.check import Check
from sglang_probe.verify.selected import prompt_lengths

Array = np.ndarray[Any, Any]
_KEY = ["layer", "rid", "attempt", "position", "forward_id"]


def options_of(run: Run) -> TelemetryConfig:
    """What the telemetry of a run was recorded with.

    Raises:
        RunDirectoryError: none was recorded.
    """
    if not run.manifest.get("telemetry"):
        raise RunDirectoryError(
            f"{run.path} has no telemetry",
            fix="record with `telemetry: {}`, or compute it from captured queries and keys "
            "(`sglang_probe.attention.run_telemetry`)",
        )
    return TelemetryConfig.model_validate(run.manifest["telemetry"])


def read_telemetry(run: Run) -> pd.DataFrame:
    """One row per measured decode step, layer and head.

    Columns: rid, attempt, position, forward_id, layer, head, step (0 at the first position behind the prompt), the
    numbers of `telemetry_options.NUMBERS`, and `top_positions` and `top_weights`, each a list, most weight first.
    Discarded steps (overshoot, and steps of an attempt that was retracted) are in it; join the ledger to tell.

    Raises:
        RunDirectoryError: none was recorded.
    """
    options = options_of(run)
    table = run.telemetry_table()
    heads = len(table["entropy"].iloc[0]) if len(table) else 0
    columns: dict[str, Any] = {name: np.repeat(table[name].to_numpy(), heads) for name in _KEY}
    columns["head"] = np.tile(np.arange(heads), len(table))
    columns["step"] = np.repeat(table["position"].to_numpy() - prompt_lengths(run, table["rid"]), heads)
    for name in NUMBERS:
        columns[name] = np.concatenate(table[name].to_list()) if len(table) else np.empty(0, np.float32)
    for name in ("top_positions", "top_weights"):
        flat = np.concatenate(table[name].to_list()) if len(table) else np.empty(0)
        columns[name] = list(flat.reshape(-1, options.top_k))
    return pd.DataFrame(columns)


def telemetry_holds(run: Run) -> Check:
    """Every decode step that was to be measured was, once a layer, by the forward that computed it; and the numbers of
    a step fit together."""
    name = "telemetry"
    claim = "each measured decode step has one row a layer, of the forward that computed it; its weights sum to 1"
    options = options_of(run)
    spans = run.spans()
    steps = positions.expand(spans[(spans["status"] == schema.COMPUTED) & spans["phase"].isin(schema.STEP_PHASES)])
    table = run.telemetry_table()
    step = steps["position"].to_numpy() - prompt_lengths(run, steps["rid"])
    known = prompt_lengths(run, steps["rid"]) >= 0
    due = steps[known & (step % options.every == 0)]
    mine = table[prompt_lengths(run, table["rid"]) >= 0]
    expected = pd.MultiIndex.from_frame(due[_KEY[1:]])
    unknown = int((~known).sum())
    note = f"{unknown} steps of requests of unknown prompt length were not asked" if unknown else None
    layers = run.manifest["telemetry_layers"]
    for layer in layers:
        found = pd.MultiIndex.from_frame(mine.loc[mine["layer"] == layer, _KEY[1:]])
        for index, what in (
            (found[found.duplicated()], "is there twice"),
            (found.difference(expected), "was not due"),
            (expected.difference(found), "is missing"),
        ):
            if len(index):
                rid, attempt, position, forward = index[0]
                violation = f"layer {layer}: {rid} attempt {attempt} position {position} (forward {forward}) {what}"
                return Check(name, claim, len(mine), "rows", violation, note)
    return Check(name, claim, len(mine), "rows", _numbers_fit(mine), note)


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
    wrong["a top position lies behind the step"] = top.max(1) > table["position"].to_numpy()
    for what, bad in wrong.items():
        if bad.any():
            r = table.iloc[int(np.argmax(bad))]
            return f"layer {r['layer']}: {r['rid']} position {r['position']}: {what}"
    return None
