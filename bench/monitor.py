"""What a live monitor costs while decoding: throughput with it, at every 16th step, as a ratio to the same server
without.

    python bench/monitor.py [--rounds 3]

Each measurement is a fresh engine that is recorded live, with and without `monitor`, in shuffled order within a round;
ratios are taken within a round. The monitor reads an SAE (`sae-probe-text`: error, active latents, three of them) and
judges every request by a profile of made-up scores. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import overhead
import pandas as pd

from sglang_probe.monitor.profile import profile
from sglang_probe.monitor.reading import Reading
from sglang_probe.monitor.sampling import Sampling
from sglang_probe.monitor.stored import StoredProfile, Watch, write_profile
from sglang_probe.monitor.trajectories import Trajectories
from sglang_probe.paths import shipped
from sglang_probe.sae.folder import read_sae, weights_sha256
from sglang_probe.steering.library import weight_hash_of_folder

SAE = shipped("models/sae-probe-text/seed-0")
POINT, FEATURES, EVERY, REFERENCE = "blocks.2.hook_resid_post", [3, 17, 203], 16, 400
LIVE: dict[str, Any] = {"live": {}}


def made_up_profile(folder: Path) -> None:
    """A profile of random rows: what it says means nothing, and takes as long."""
    import torch

    sae = read_sae(SAE, hook_point=POINT)
    reading = Reading(sae=sae, features=FEATURES)
    x = torch.randn((2 * REFERENCE, sae.width), generator=torch.Generator().manual_seed(0))
    names = [str(i) for i in range(REFERENCE)]
    frame = pd.DataFrame({"run": 0, "rid": names, "family": names, "rows": 2})
    of = np.repeat(np.arange(REFERENCE), 2)
    usual, _, _ = profile(Trajectories(reading.names, reading.columns(x), of, frame, x))
    watch = Watch(
        hook_point=POINT,
        sampling=Sampling(every=EVERY),
        features=FEATURES,
        sae_sha256=weights_sha256(SAE),
        columns=list(reading.names),
    )
    weights = weight_hash_of_folder(shipped("models/probe-text/checkpoint"))
    write_profile(folder, StoredProfile(usual, watch, {}, "probe-text", weights, []), overwrite=True)


def measure(mode: str) -> dict[str, float]:
    """One engine."""
    with tempfile.TemporaryDirectory() as name:
        options = dict(LIVE)
        if mode == "monitor":
            made_up_profile(Path(name))
            options["monitor"] = {"profile": name, "sae": str(SAE)}
        overhead.MODES[mode] = options
        return overhead.measure(mode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(measure(args.one)))
        return
    rng, rounds = random.Random(1), []
    for i in range(args.rounds):
        order = ["live", "monitor"]
        rng.shuffle(order)
        found = {}
        for mode in order:
            command = [sys.executable, __file__, "--one", mode]
            out = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
            lines = [line for line in out.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                raise SystemExit(f"{mode} failed:\n{out.stdout[-2000:]}\n{out.stderr[-4000:]}")
            found[mode] = json.loads(lines[-1].removeprefix("RESULT "))
        rounds.append({what: found["monitor"][what] / found["live"][what] for what in found["live"]})
        print(f"round {i + 1}/{args.rounds}: {rounds[-1]}", flush=True)
    told = {w: {"median": statistics.median(r[w] for r in rounds), "all": [r[w] for r in rounds]} for w in rounds[0]}
    print("MONITOR", json.dumps({"every": EVERY, "ratio to the same server without": told}))


if __name__ == "__main__":
    main()
