"""Telemetry measured in the engine beside that computed from captured rows, and where the two differ.

    python bench/gpu_kit/telemetry.py RUN RESULT.json

On an H200 587 of 110,592 top positions differed. Two explanations can be told apart here. Two requests that compute one
position at once have keys that differ in bf16, and afterwards one attends to the other's, which its own captured rows
do not hold: then only requests with rebound positions differ. Or numerics: then the weights that change places lie
within rounding of each other, in any request.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sglang_probe.attention.run_telemetry import write_telemetry
from sglang_probe.run.run import load_run
from sglang_probe.run.telemetry import options_of

KEY = ["rid", "layer", "head", "step"]


def where_they_differ(online: pd.DataFrame, offline: pd.DataFrame, rebinds: pd.DataFrame) -> dict[str, Any]:
    """Top positions of the same steps, by whether the request had rebound positions by then.

    Args:
        online: as `Run.telemetry`. offline: with the columns of `KEY`, `top_positions` and `top_weights`.
        rebinds: as `Run.rebinds`.
    """
    both = online.merge(offline, on=KEY, suffixes=("", "_rows"))
    ours, theirs = (np.stack(both[c].to_list()) for c in ("top_positions", "top_positions_rows"))
    weights = np.stack(both["top_weights_rows"].to_list())
    # The last place may have lost a tie to a position that is not among them.
    differ = (ours != theirs) & (np.arange(ours.shape[1]) < ours.shape[1] - 1)
    among, ever = np.zeros(len(both), dtype=bool), np.zeros(len(both), dtype=bool)
    spans = dict(iter(rebinds.groupby("rid")))
    for i, (rid, forward) in enumerate(zip(both["rid"], both["forward_id"], strict=True)):
        mine = spans.get(rid)
        mine = None if mine is None else mine[mine["at_forward"] <= forward]
        if mine is None or not len(mine):
            continue
        ever[i] = True
        moved = np.concatenate([ours[i][differ[i]], theirs[i][differ[i]]])
        among[i] = bool(
            ((moved[:, None] >= mine["start"].to_numpy()) & (moved[:, None] < mine["end"].to_numpy())).any()
        )
    wrong = differ.any(1)
    nearest = np.where(weights[:, 1:] > 0, 1 - weights[:, 1:] / np.maximum(weights[:, :-1], 1e-30), 1.0).min(1)
    quantiles = np.quantile(nearest[wrong], [0, 0.5, 0.9, 1]).round(7).tolist() if wrong.any() else []
    return {
        "steps and heads": len(both),
        "positions that differ": int(differ.sum()),
        "heads that differ": int(wrong.sum()),
        "of these, where a position that changed places was rebound": int((wrong & among).sum()),
        "heads of requests without a rebound position": int((~ever).sum()),
        "of these, heads that differ": int((wrong & ~ever).sum()),
        "smallest relative gap of two weights, where heads differ (least, median, 90 %, most)": quantiles,
    }


def main(folder: Path, result: Path) -> None:
    run = load_run(folder)
    told: dict[str, Any] = {"rows measured": len(run.telemetry())}
    path = result.with_suffix(".parquet")
    write_telemetry(run, path, options_of(run).options())
    told["top positions"] = where_they_differ(run.telemetry(), pd.read_parquet(path), run.rebinds())
    from tests.end_to_end.telemetry_parity import telemetry_differences

    try:
        worst = telemetry_differences(run, path)
        told["worst difference"] = {k: [float(v["max"]), int(v["values"])] for k, v in worst.iterrows()}
    except AssertionError as e:
        told["assertion"] = repr(e)[:500]
    measured = run.telemetry_table()["forward_id"].unique()
    told["measured forwards, by mode"] = (
        run.forwards().set_index("forward_id").loc[measured, "mode"].value_counts().to_dict()
    )
    result.write_text(json.dumps(told, indent=2))
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
