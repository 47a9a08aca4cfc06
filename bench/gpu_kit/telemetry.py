"""Telemetry measured in the engine beside that computed from captured rows. argv: run, result JSON."""

import json
import sys
from pathlib import Path

from sglang_probe.run.run import load_run
from tests.end_to_end.telemetry_parity import telemetry_differences

run = load_run(Path(sys.argv[1]))
result = {"rows measured": len(run.telemetry())}
try:
    worst = telemetry_differences(run, Path(sys.argv[2]).with_suffix(".parquet"))
    result["worst difference"] = {k: [float(v["max"]), int(v["values"])] for k, v in worst.iterrows()}
except AssertionError as e:
    result["assertion"] = repr(e)[:500]
measured = run.telemetry_table()["forward_id"].unique()
result["measured forwards, by mode"] = (
    run.forwards().set_index("forward_id").loc[measured, "mode"].value_counts().to_dict()
)
Path(sys.argv[2]).write_text(json.dumps(result, indent=2))
print(json.dumps(result))
