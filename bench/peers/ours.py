"""sglang-probe, as `sglang-probe harvest` records: ledger, rows and run directory, durable and closed.

One engine makes all recordings, each with an empty cache, so that the start of SGLang is told apart: it is most of what
a short command takes, and nothing of what a long one does. Threads are the process's `OMP_NUM_THREADS`.
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
    options: Any = {"dtype": "float32", "hook_points": points, "sampling": sampling, **given.get("options", {})}
    with Experiment(model=given["model"], prompts=every, **options) as experiment:
        with tempfile.TemporaryDirectory(dir=given["scratch"]) as folder:
            experiment.record(Path(folder) / "first", requests=experiment.requests[:1])
        loaded = time.perf_counter() - began
        answer({"load_seconds": loaded, "versions": versions("torch", "transformers", "sglang")})
        for line in sys.stdin:
            asked = json.loads(line)
            out = Path(asked["out"])
            prompts = json.loads(Path(asked["prompts"]).read_text())
            began = time.perf_counter()
            run = experiment.record(out, requests=list(_of_prompts(prompts, None, sampling)))
            seconds = time.perf_counter() - began
            spans = run.spans()
            reused = int((spans["end"] - spans["start"])[spans["status"] == "reused"].sum())
            serving = sum(start["seconds"] for start in run.manifest["starts"])
            found = {"rows": run.row_count(), "reused": reused, "serving_seconds": serving}
            answer({"seconds": seconds, "peak_rss_mib": _peak_rss_mib(), **found})


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
