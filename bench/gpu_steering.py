"""Interventions on a GPU: are they right in replayed graphs, and what do they cost a decode step?

    python bench/gpu_steering.py OUT.json --model DIR [--server JSON] [--rounds 3] [--fused]

Parity: requests with and without interventions, everybody at once, recorded with graphs and with
`disable_cuda_graph`. `verify --transformers` recomputes some of each with the same interventions, and rows of both
recordings are compared as far as they decoded the same tokens. A plain request must not be changed by those beside it:
that is asked of the plain rows alone.

Cost: one engine with graphs and no hook points serves 32 requests of which 0, 1, 8 or 32 are steered while decoding,
in shuffled order within a round; another engine, without a library, serves them afterwards. A step lasts from one
launch to the next; ratios are of medians, within a round where there is one.

On a CPU it tests itself and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from sglang_probe.harvest.config import Recording
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.host import EngineHost
from sglang_probe.harvest.prepare import Prepared, prepare
from sglang_probe.run.run import Run
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.stats.distance import row_distance
from sglang_probe.steering.library import MadeBy, write
from sglang_probe.workload.build import Workload
from sglang_probe.workload.request import Request
from tests.attack.steering import request

_ROWS, _PROMPT, _NEW = 32, 64, 96


def make_library(folder: Path, model: Path, config: dict[str, Any]) -> None:
    """A direction of unit norm after a middle and a late layer, and a feature after the middle one."""
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    generator = torch.Generator().manual_seed(0)

    def unit() -> torch.Tensor:
        x = torch.randn(width, generator=generator)
        return x / x.norm()

    feature = {
        "encoder": unit(),
        "encoder_bias": torch.tensor(0.0),
        "threshold": torch.tensor(0.0),
        "decoder_bias": torch.zeros(width),
    }
    for name, layer, more in (("up", layers // 4, {}), ("late", layers // 2, {}), ("feature", layers // 4, feature)):
        write(
            folder,
            {"vector": unit(), **more},
            name=name,
            kind="feature" if more else "direction",
            hook_point=f"blocks.{layer}.hook_resid_post",
            model=str(model),
            model_weight_hash=weight_hash_of_folder(model),
            layer_mean_norm=1.0,
            percentile99=1.0 if more else None,
            made_by=MadeBy(command="bench/gpu_steering.py"),
        )


def prepared(args: argparse.Namespace, library: Path | None, hook_points: list[str], more: dict[str, Any]) -> Prepared:
    on_gpu = torch.cuda.is_available()
    config = {
        "model": str(args.model),
        "dtype": "bfloat16" if on_gpu else "float32",
        "simulated_graphs": not on_gpu,
        "hook_points": hook_points,
        "concurrency": _ROWS,
        **({} if library is None else {"steer": {"library": str(library), "fused": args.fused}}),
        "server": {**args.server, "max_running_requests": _ROWS, **more},
    }
    return prepare(Recording.model_validate(config), workload=Workload((request(0, "none", [1, 2], []),)), proving=True)


def traffic() -> list[Request]:
    """Every kind of intervention and window, and as many requests without."""
    up, rng = {"vector": "up", "strength": 4.0}, random.Random(0)
    kinds: list[list[dict[str, Any]]] = [
        [up],
        [{**up, "phases": ["decode"]}],
        [{**up, "phases": ["decode"], "generation_window": [5, 20]}],
        [{**up, "prompt_window": [-20, None]}],
        [{"vector": "late", "op": "project_out"}],
        [{"vector": "late", "op": "clamp", "strength": 3.0}],
        [{"vector": "feature", "op": "ablate_feature"}],
        [up, {"vector": "late", "op": "cap", "strength": 0.1}],
    ]
    found = []
    for i, kind in enumerate([k for pair in zip(kinds, [[]] * len(kinds), strict=True) for k in pair] * 2):
        ids = [rng.randrange(10, 3000) for _ in range(rng.randrange(20, 200))]
        found.append(request(i, f"r{i:02d}", ids, kind, _NEW))
    return found


def parity(args: argparse.Namespace, folder: Path, layers: int) -> dict[str, Any]:
    points = ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in (layers // 4, layers // 2, layers - 1))]
    requests, runs, found = traffic(), {}, {}
    for name, more in (("graphs", {}), ("eager", {"disable_cuda_graph": True})):
        with EngineHost() as host:
            ours = prepared(args, folder / "library", points, more)
            runs[name] = run = record([RunSpec(name, requests)], ours, folder / "runs", host=host)[name]
        replayed = run.forwards().groupby("mode")["graph"].mean().to_dict()
        found[name] = {"rows": run.row_count(), "share replayed": replayed, "interventions": len(run.interventions())}
    command = [sys.executable, "-m", "sglang_probe", "verify", str(runs["graphs"].path)]
    command += ["--library", str(folder / "library"), "--transformers", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    found["verify"] = {"passed": done.returncode == 0, "output": (done.stdout + done.stderr)[-5000:]}
    found["graphs against eager"] = compared(runs["graphs"], runs["eager"], points)
    return found


def compared(one: Run, two: Run, points: list[str]) -> dict[str, Any]:
    """Rows of the same positions of the same tokens, plain and steered requests apart."""
    outputs = [r.requests().set_index("rid")["output_ids"] for r in (one, two)]
    prompt = one.requests().set_index("rid")["prompt_len"]
    steered = set(one.interventions()["rid"])
    tokens = [r.tokens() for r in (one, two)]
    found: dict[str, Any] = {}
    for kind in ("plain", "steered"):
        errors: dict[str, list[torch.Tensor]] = {p: [] for p in points}
        same = 0
        for rid in (r for r in outputs[0].index if (r in steered) == (kind == "steered")):
            a, b = (list(o[rid]) for o in outputs)
            agreed = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))
            same += a == b
            rows = [t[(t["rid"] == rid) & (t["row"] >= 0)].set_index("position") for t in tokens]
            both = rows[0].index.intersection(rows[1].index)
            both = both[both < prompt[rid] + agreed]
            for p in points:
                pair = [run.rows(p, r.loc[both, "row"].to_numpy()) for run, r in zip((one, two), rows, strict=True)]
                errors[p].append(torch.as_tensor(row_distance(*pair)[0]))
        told = {p: torch.cat(e) for p, e in errors.items()}
        found[kind] = {
            "same output": same,
            **{
                p: {"rows": len(e), "equal": float((e == 0).double().mean()), "worst": float(e.max())}
                for p, e in told.items()
            },
        }
    return found


def cost(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rng = random.Random(0)
    prompts = [[rng.randrange(10, 3000) for _ in range(_PROMPT)] for _ in range(_ROWS)]
    up = [{"vector": "up", "strength": 4.0, "phases": ["decode"]}]
    ratios: dict[int, list[float]] = {1: [], 8: [], 32: []}
    steps: list[dict[int, float]] = []

    def step(ours: Prepared, name: str, steered: int) -> float:
        asked = [request(i, f"r{i}", p, up if i < steered else [], _NEW * 2) for i, p in enumerate(prompts)]
        run = record([RunSpec(name, asked)], ours, folder / "cost", host=host)[name]
        full = run.forwards().query("mode == 'decode' and requests == @_ROWS")
        return float(statistics.median(full["launched"].diff().dropna()))

    with EngineHost() as host:
        ours = prepared(args, folder / "library", [], {})
        for n in range(-1, args.rounds):  # the first one warms up
            conditions = [0, *ratios]
            rng.shuffle(conditions)
            median: dict[int, float] = {}
            for k in conditions:
                median[k] = step(ours, f"{n} {k}", k)
            if n >= 0:
                steps.append(median)
                for k, r in ratios.items():
                    r.append(median[0] / median[k])
    with EngineHost() as host:
        ours = prepared(args, None, [], {})
        without = [step(ours, f"{n} without", 0) for n in range(-1, args.rounds)][1:]
    return {
        "rows": _ROWS,
        "seconds of a step, without a library": without,
        "seconds of a step, by rows steered": steps,
        "throughput, of that without interventions": {k: statistics.median(r) for k, r in ratios.items()},
        "all": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--server", type=json.loads, default={})
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fused", action="store_true", help="one kernel a layer, instead of PyTorch's operations")
    parser.add_argument("--steps", nargs="+", default=["parity", "cost"])
    args = parser.parse_args()
    args.model = args.model.resolve()
    config = json.loads((args.model / "config.json").read_text())
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_library(folder / "library", args.model, config)
        for step, run in (
            ("parity", lambda: parity(args, folder, config["num_hidden_layers"])),
            ("cost", lambda: cost(args, folder)),
        ):
            if step not in args.steps:
                continue
            began = time.time()
            try:
                told[step] = run()
            except Exception:
                told[step] = {"failed": traceback.format_exc()[-3000:]}
            told[step]["seconds"] = time.time() - began
            args.out.write_text(json.dumps(told, indent=2))  # should the time end here
            print(step, json.dumps(told[step]), flush=True)


if __name__ == "__main__":
    main()
