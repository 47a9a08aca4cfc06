"""What a live monitor and a gated clamp cost while decoding: throughput with them, as a ratio to the same server
without.

    python bench/monitor.py [--rounds 3] [--out docs/evidence/benchmarks.md]

Three engines that are recorded live: one plain, one with `monitor`, one with a clamp that waits for a gate. One runs at
a time, there and back within a round (`paired.py`). The monitor reads every 16th decode step with an SAE
(`sae-probe-text`: error, active latents, three of them) and judges every request by a profile of made-up scores. The
clamped server gets requests that are out of scope of its gate, and requests that are in scope, all of whose decode rows
it then changes: the most that it can have to do.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from page import machine, write_section
from paired import MODEL, OUTPUT, ROWS, Condition, Paired, prompts_of, ratios, rounds_of, told

from sglang_probe.monitor.profile import profile
from sglang_probe.monitor.reading import Reading
from sglang_probe.monitor.sampling import Sampling
from sglang_probe.monitor.stored import StoredProfile, Watch, write_profile
from sglang_probe.monitor.trajectories import Trajectories
from sglang_probe.paths import shipped
from sglang_probe.run.journal import NAME
from sglang_probe.run.run import load_run
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.sae.folder import read_sae, weights_sha256
from tests.steering.clamped import make_clamp, write_gate

SAE = shipped("models/sae-probe-text/seed-0")
POINT, LAYER, FEATURES, EVERY, REFERENCE = "blocks.2.hook_resid_post", 2, [3, 17, 203], 16, 400
OUTSIDE, INSIDE = "clamp, out of scope", "clamp, in scope"
CONDITIONS = {
    "live": Condition("live"),
    "monitor": Condition("monitor"),
    OUTSIDE: Condition("clamp"),
    INSIDE: Condition("clamp", marked=True),
}
SHOWN = {"monitor": "monitor", OUTSIDE: "clamp, out of scope of its gate", INSIDE: INSIDE}
HEADING = "Cost of a monitor and of a gated clamp"


def made_up_profile(folder: Path) -> dict[str, Any]:
    """A server's `monitor`, by a profile of random rows: what it says means nothing, and takes as long."""
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
    weights = weight_hash_of_folder(MODEL)
    write_profile(folder, StoredProfile(usual, watch, {}, "probe-text", weights, []), overwrite=True)
    return {"profile": str(folder), "sae": str(SAE)}


def made_up_clamp(folder: Path) -> dict[str, Any]:
    """A server's `steer`: a clamp of every decode row of those prompts for which its gate opens: marked ones."""
    scope, others = (_last_rows(prompts_of(-1, marked=marked, rows=100)) for marked in (True, False))
    folder.mkdir()
    write_gate(folder / "library", scope, others, POINT)
    return {"library": str(folder / "library"), "clamps": [{**make_clamp(folder), "probe": "scope"}]}


def _last_rows(prompts: list[list[int]]) -> torch.Tensor:
    """The residual stream after the gate's layer of the last token of each prompt, `[n, d]`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(torch.tensor(prompts), output_hidden_states=True)
    return out.hidden_states[LAYER + 1][:, -1].float()


def check_gates(folder: Path) -> None:
    """Every marked request opened the gate, and no other: else what was measured is not what its name says.

    Raises:
        SystemExit: a gate was decided otherwise.
    """
    gates = pd.concat([load_run(p.parent).gates() for p in sorted(folder.rglob(NAME))])
    marked = gates["rid"].str.startswith("marked")
    if not marked.any() or marked.all() or (marked != gates["opened"]).any():
        raise SystemExit(f"the gate opened for {gates['opened'].sum()} requests, and {marked.sum()} are in scope")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no round after so many")
    parser.add_argument("--out", type=Path, help="page whose section is replaced")
    parser.add_argument("--only", nargs="+", choices=list(CONDITIONS)[1:], default=list(CONDITIONS)[1:])
    args = parser.parse_args()
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        live: dict[str, Any] = {"live": {"privacy": "ids"}}
        probes = {"live": live}
        if "monitor" in args.only:
            probes["monitor"] = {**live, "monitor": made_up_profile(folder / "profile")}
        if any("clamp" in n for n in args.only):
            probes["clamp"] = {**live, "steer": made_up_clamp(folder / "clamp")}
        loads = [os.getloadavg()[0]]
        conditions = {n: c for n, c in CONDITIONS.items() if n == "live" or n in args.only}
        paired = Paired(probes, {"dtype": "float32"})
        try:
            found = rounds_of(paired, conditions, args.rounds, seconds=args.seconds)
        finally:
            paired.close()
        if "clamp" in probes and len(args.only) > 1:
            check_gates(paired.runs["clamp"])
        paired.forget()
    compared = [(n, "live") for n in args.only]
    if {OUTSIDE, INSIDE} <= set(args.only):
        compared.append((INSIDE, OUTSIDE))
    rows = [(n, base, told(ratios(found, n, base, "cpu"))) for n, base in compared]
    loads.append(os.getloadavg()[0])
    text = section(f"{machine()}, shared with other work (load {min(loads):.0f} to {max(loads):.0f})", len(found), rows)
    if args.out is not None:
        write_section(args.out, HEADING, text)
    print(text)


def section(where: str, rounds: int, rows: Sequence[tuple[str, str, str]]) -> str:
    """The section of the page.

    Args:
        rows: server, the one that it is compared with, and the ratio.
    """
    lines = [
        "| server | throughput over that of the server without, per CPU second | goal |",
        "|---|---|---|",
    ]
    for name, base, ratio in rows:
        goal = ">= 0.99" if base == "live" and name != INSIDE else ""
        shown = SHOWN[name] if base == "live" else f"{SHOWN[name]}, over the same server out of scope"
        lines.append(f"| {shown} | {ratio} | {goal} |".replace("|  |", "| |"))
    return (
        f"{where}. `python bench/monitor.py`, {rounds} rounds: model `probe-text` in float32 on the CPU reference "
        f"platform, {ROWS} requests of {Condition.prompt} prompt tokens decode {OUTPUT} tokens each on servers that "
        "are recorded live; one server runs at a time. A round visits all of them in one order and then in the "
        "reverse order; the ratio is of the sums of both visits, and the table has the median of the rounds (range). "
        "Per CPU second: of the scheduler process with its writer's thread; the wall clock says nothing on so busy a "
        f"machine and is left out. The monitor reads every {EVERY}th step by an SAE of 1,024 latents and judges every "
        "request; a clamp in scope changes every decode row.\n\n" + "\n".join(lines)
    )


if __name__ == "__main__":
    main()
