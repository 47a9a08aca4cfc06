"""Telemetry that was recorded while requests were served, against the same computed from captured rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from sglang_probe.attention.run_telemetry import write_telemetry
from sglang_probe.run import schema
from sglang_probe.run.run import Run
from sglang_probe.run.telemetry import options_of
from sglang_probe.run.telemetry_options import NUMBERS

SHARE = "top_positions (share that differ)"
"""Where two weights are equal up to rounding their positions may change places; anything else is an error."""


def telemetry_differences(run: Run, path: Path) -> pd.DataFrame:
    """Per number the largest absolute difference (relative for `support`) and how many values were compared.

    Raises:
        AssertionError: the two do not hold the same steps, or one has a number where the other has none.
    """
    key = ["rid", "layer", "head", "step"]
    write_telemetry(run, path, options_of(run).options())
    offline = pd.read_parquet(path).set_index(key).sort_index()
    online = run.telemetry()
    spans = run.spans()
    discarded = spans[spans["phase"] == schema.OVERSHOOT][["rid", "attempt", "start"]]
    place = ["rid", "attempt", "position"]
    thrown = pd.MultiIndex.from_frame(online[place]).isin(pd.MultiIndex.from_frame(discarded))
    online = online[~thrown].set_index(key).sort_index()
    assert online.index.equals(offline.index), "not the same steps"
    rows = []
    for name in NUMBERS:
        ours, theirs = online[name].to_numpy(np.float64), offline[name].to_numpy(np.float64)
        assert np.array_equal(np.isnan(ours), np.isnan(theirs)), name
        scale = theirs if name == "support" else 1.0
        difference = np.abs(ours - theirs) / scale
        rows.append((name, np.nanmax(difference), int((~np.isnan(ours)).sum())))
    ours, theirs = (np.stack(f["top_weights"].to_list()) for f in (online, offline))
    rows.append(("top_weights", np.abs(ours - theirs).max(), ours.size))
    at_ours, at_theirs = (np.stack(f["top_positions"].to_list()) for f in (online, offline))
    gap = np.abs(np.diff(theirs, axis=1)).min(axis=1, keepdims=True)
    agrees = (at_ours == at_theirs) | (gap < 1e-6) | (np.arange(ours.shape[1]) == ours.shape[1] - 1)
    assert agrees.all(), f"{int((~agrees).sum())} of {agrees.size} positions differ, and not by a tie"
    rows.append((SHARE, float((at_ours != at_theirs).mean()), ours.size))
    return pd.DataFrame(rows, columns=["number", "max", "values"]).set_index("number")
