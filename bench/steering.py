"""What interventions cost while decoding: seconds of a decode step of 32 rows, of which 1, 8 or 32 are changed.

    python bench/steering.py [--rounds 3]

One engine with the built-in model serves all conditions, in shuffled order within a round; a ratio is of medians over
the steps with all 32 rows, within its round, so that a slow minute of a shared machine hits all of them alike. Each
changed row has one vector added at one layer. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

from sglang_probe.harvest.config import Recording
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import prepare
from sglang_probe.workload.build import Workload
from tests.attack.steering import request
from tests.end_to_end.steering import make_library

_ROWS, _NEW = 32, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    rng = random.Random(0)
    prompts = [[rng.randrange(10, 3000) for _ in range(16)] for _ in range(_ROWS)]
    ratios: dict[int, list[float]] = {1: [], 8: [], 32: []}
    with tempfile.TemporaryDirectory() as name, EngineHost() as host:
        folder = Path(name)
        make_library(folder / "library")
        config = {
            "hook_points": [],
            "concurrency": _ROWS,
            "steer": {"library": str(folder / "library")},
            "server": {"max_running_requests": _ROWS},
        }
        ours = prepare(Recording.model_validate(config), workload=Workload((request(0, "none", [1, 2], []),)))
        for n in range(-1, rounds):  # the first one warms up
            conditions = [0, *ratios]
            rng.shuffle(conditions)
            median = {}
            for steered in conditions:
                up = [{"vector": "up", "strength": 6, "phases": ["decode"]}]
                asked = [request(i, f"r{i}", p, up if i < steered else [], _NEW) for i, p in enumerate(prompts)]
                run = record([RunSpec(f"{n} {steered}", asked)], ours, folder / "runs", host=host)[f"{n} {steered}"]
                steps = run.forwards().query("mode == 'decode' and requests == @_ROWS")
                median[steered] = statistics.median(steps["seconds"])
            for steered, found in ratios.items():
                if n >= 0:
                    found.append(median[0] / median[steered])
    told = {steered: {"median": statistics.median(r), "all": [round(x, 3) for x in r]} for steered, r in ratios.items()}
    print("STEERING", json.dumps({"rows": _ROWS, "throughput, of that without interventions": told}))


if __name__ == "__main__":
    main()
