"""What attention to kept sets costs, or saves: decode throughput of our backend as ratios to SGLang's `torch_native`.

    python bench/eviction.py [--rounds 3] [--out docs/evidence/benchmarks.md]

A round starts one engine with the stock backend and one with ours, in shuffled order, each in a process of its own,
both recording the ledger. Prompts are served from the radix cache, so that what is timed is decoding. In our engine the
budgets take turns, each naming kept sets that every kv head fills at random; `uneven` keeps as much as 50 % on average,
between half and three halves of that in each head, so that heads are padded to the longest.
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
from pathlib import Path
from typing import Any

import torch
from page import machine, write_section
from paired import scheduler_process

from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.harvest.engine import ProbedEngine
from sglang_probe.kept_set import Kept, write_kept
from sglang_probe.paths import shipped

STOCK, NONE = "stock `torch_native`", "ours, no eviction"
BUDGETS = {"ours, 100 %": 1.0, "ours, 50 %": 0.5, "ours, 50 % uneven": 0.5, "ours, 12.5 %": 0.125}
LAYERS, KV_HEADS = 4, 4
CONCURRENT, OUTPUT, PASSES = 32, 128, 3
PROMPTS = [256 + 8 * i for i in range(CONCURRENT)]


def kept_set(length: int, share: float, uneven: bool) -> Kept:
    """Random positions of each kv head."""
    shares = torch.full((1, LAYERS, KV_HEADS), share)
    if uneven:
        shares = shares * torch.tensor([0.5, 0.75, 1.25, 1.5])
    ranks = torch.rand(1, LAYERS, KV_HEADS, length).argsort(-1).argsort(-1)
    return Kept(ranks < (shares * length).round().int()[..., None])


def measure(stock: bool, dtype: str) -> dict[str, dict[str, float]]:
    """Tokens per wall second and per CPU second of the scheduler, by mode."""
    torch.manual_seed(0)
    rng = random.Random(0)
    prompts = [[rng.randrange(100, 3000) for _ in range(n)] for n in PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept.safetensors"
        sets = {
            f"{mode} {i}": kept_set(n, share, "uneven" in mode)
            for mode, share in BUDGETS.items()
            for i, n in enumerate(PROMPTS)
        }
        write_kept(kept, sets)
        run = Path(folder) / "run"
        run.mkdir()
        probe = EngineProbeConfig(
            run=run, asks=["cache"] if stock else ["cache", "evict"], kept=None if stock else kept
        )
        server: dict[str, Any] = {"dtype": dtype, "attention_backend": "torch_native" if stock else "probe_torch"}
        with ProbedEngine(str(shipped("models/probe-text/checkpoint")), probe, server) as engine:
            scheduler = scheduler_process()

            async def serve(name: str, new: int, evict: str | None = None, cache: str = "read_only") -> None:
                requests = []
                for i, prompt in enumerate(prompts):
                    options = {"cache": cache} if evict is None else {"evict": f"{evict} {i}"}
                    params = {"max_new_tokens": new, "temperature": 0.0, "ignore_eos": True}
                    requests.append((f"{name}-{i}", prompt, {**params, "custom_params": {"probe": options}}))
                async for _ in engine.serve(requests, CONCURRENT):
                    pass

            engine.run(serve("fill", 16, cache="on"))
            found: dict[str, list[tuple[float, float]]] = {}
            modes: dict[str, str | None] = {STOCK: None} if stock else {NONE: None, **{m: m for m in BUDGETS}}
            for i in range(PASSES):
                for mode, evict in rng.sample(list(modes.items()), len(modes)):
                    began, cpu = time.perf_counter(), sum(scheduler.cpu_times()[:2])
                    engine.run(serve(f"{mode}-{i}", OUTPUT, evict))
                    found.setdefault(mode, []).append(
                        (time.perf_counter() - began, sum(scheduler.cpu_times()[:2]) - cpu)
                    )
            engine.close_recording()
    tokens = CONCURRENT * OUTPUT
    return {
        mode: {
            "decode": tokens / statistics.median(wall for wall, _ in passes),
            "decode per CPU second": tokens / statistics.median(cpu for _, cpu in passes),
        }
        for mode, passes in found.items()
    }


def table(rounds: list[dict[str, dict[str, float]]]) -> str:
    """Markdown: per mode the median throughput, and median and range of the ratios to the stock backend by round."""
    kinds = list(rounds[0][STOCK])
    lines = ["| attention | " + " | ".join(f"{k} tok/s | ratio to stock (range)" for k in kinds) + " |"]
    lines.append("|---|" + "---|---|" * len(kinds))
    for mode in (STOCK, NONE, *BUDGETS):
        cells = [mode]
        for kind in kinds:
            ratios = [r[mode][kind] / r[STOCK][kind] for r in rounds]
            cells.append(f"{statistics.median(r[mode][kind] for r in rounds):,.0f}")
            cells.append(
                "1"
                if mode == STOCK
                else f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--out", type=Path, help="the page whose section is replaced; without it the table is printed")
    parser.add_argument("--one", choices=["stock", "ours"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(measure(args.one == "stock", args.dtype)))
        return
    rng = random.Random(1)
    rounds: list[dict[str, dict[str, float]]] = []
    for i in range(args.rounds):
        rounds.append({})
        for which in rng.sample(["stock", "ours"], 2):
            command = [sys.executable, __file__, "--one", which, "--dtype", args.dtype]
            out = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
            lines = [line for line in out.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                raise SystemExit(f"{which} failed:\n{out.stdout[-2000:]}\n{out.stderr[-4000:]}")
            rounds[-1] |= json.loads(lines[-1].removeprefix("RESULT "))
        print(f"round {i + 1}/{args.rounds}", {m: round(r["decode"]) for m, r in rounds[-1].items()}, flush=True)
    text = (
        f"{machine()}. Model `probe-text` in {args.dtype} on the CPU reference platform, {CONCURRENT} concurrent "
        f"requests of {min(PROMPTS)} to {max(PROMPTS)} prompt tokens served from the radix cache, {OUTPUT} output "
        f"tokens each, ledger recorded, one position of the prompt computed. {args.rounds} rounds of one engine each "
        f"for the stock backend and for ours, median of {PASSES} passes; ratios are taken within a round. Positions "
        "that are not kept stay in memory.\n\n" + table(rounds) + "\n"
    )
    if args.out:
        write_section(args.out, "Attention to kept sets", text)
    print(text)


if __name__ == "__main__":
    main()
