"""Reading the attention telemetry that was recorded while requests were served."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run.damage import reading
from sglang_probe.run.files import RunFiles
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.telemetry_options import NUMBERS, TelemetryConfig
from sglang_probe.run.tokens import prompt_lengths

Array = np.ndarray[Any, Any]
KEY = ["layer", "rid", "attempt", "position", "forward_id"]


def options_of(run: RunFiles) -> TelemetryConfig:
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
    with reading(run.path / MANIFEST):
        return TelemetryConfig.model_validate(run.manifest["telemetry"])


def read_telemetry(run: RunFiles) -> pd.DataFrame:
    """One row per measured decode step, layer and head.

    Columns: rid, attempt, position, forward_id, layer, head, step (0 at the first position after the prompt), the
    numbers of `telemetry_options.NUMBERS`, and `top_positions` and `top_weights`, each a list, most weight first.
    Discarded steps (overshoot, and steps of an attempt that was retracted) are in it; join the ledger to tell.

    Raises:
        RunDirectoryError: none was recorded.
    """
    options = options_of(run)
    table = run.telemetry_table()
    heads = len(table["entropy"].iloc[0]) if len(table) else 0
    columns: dict[str, Any] = {name: np.repeat(table[name].to_numpy(), heads) for name in KEY}
    columns["head"] = np.tile(np.arange(heads), len(table))
    columns["step"] = np.repeat(table["position"].to_numpy() - prompt_lengths(run, table["rid"]), heads)
    for name in NUMBERS:
        columns[name] = np.concatenate(table[name].to_list()) if len(table) else np.empty(0, np.float32)
    for name in ("top_positions", "top_weights"):
        flat = np.concatenate(table[name].to_list()) if len(table) else np.empty(0)
        columns[name] = list(flat.reshape(len(columns["head"]), options.top_k))
    return pd.DataFrame(columns)
