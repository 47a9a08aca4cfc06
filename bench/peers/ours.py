"""sglang-probe, as `sglang-probe harvest` records: ledger, rows and run directory, durable and closed.

One engine makes all recordings, each with an empty cache, so that the start of SGLang is told apart: it is most of what
a short command takes, and nothing of what a long one does.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from child import answer, versions


def main() -> None:
    """Start, and answer until stdin ends."""
    given = json.loads(sys.argv[1])
    began = time.perf_counter()
    from sglang_probe import Experiment
    from sglang_probe.harvest.api import _of_prompts

    points = [f"blocks.{layer}.hook_resid_post" for layer in given["layers"]]
    sampling = {"max_new_tokens": 1, "temperature": 0.0}
    # All of them, because the size of the KV pool is settled when the engine starts.
    every = [ids for path in given["prompts"] for ids in json.loads(Path(path).read_text())]
    options: Any = {
        "dtype": "float32",
        "hook_points": points,
        "sampling": sampling,
        "order": "families",
        **given.get("options", {}),
    }
    with Experiment(model=given["model"], prompts=every, **options) as experiment:
        with tempfile.TemporaryDirectory(dir=given["scratch"]) as folder:
            experiment.record(Path(folder) / "first", requests=experiment.requests[:1])
        loaded = time.perf_counter() - began
        answer({"load_seconds": loaded, "versions": versions("torch", "transformers", "sglang")})
        for line in sys.stdin:
            asked = json.loads(line)
            out = Path(asked["out"])
            prompts = json.loads(Path(asked["prompts"]).read_text())
            began, cpu = time.perf_counter(), _cpu_seconds()
            run = experiment.record(out, requests=list(_of_prompts(prompts, None, sampling)))
            spent = {"seconds": time.perf_counter() - began, "cpu_seconds": _cpu_seconds() - cpu}
            spans = run.spans()
            reused = int((spans["end"] - spans["start"])[spans["status"] == "reused"].sum())
            serving = sum(start["seconds"] for start in run.manifest["starts"])
            found = {"rows": run.row_count(), "reused": reused, "serving_seconds": serving}
            answer({**spent, "peak_rss_mib": _peak_rss_mib(), **found})


def _cpu_seconds() -> float:
    """Of this process and SGLang's, whose idle loops are in it."""
    me = psutil.Process()
    return sum(sum(p.cpu_times()[:2]) for p in (me, *me.children(recursive=True)))


def _peak_rss_mib() -> float:
    """The sum over this process and SGLang's, so that pages which they share count several times."""
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        status = Path(f"/proc/{process.pid}/status").read_text()
        total += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)
    return total / 1024


if __name__ == "__main__":
    main()
