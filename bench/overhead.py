"""What the probe costs: throughput of one engine under each configuration, as ratios to stock SGLang.

    python bench/overhead.py [--rounds 5] [--out docs/evidence/benchmarks.md]

Each measurement is a fresh engine in a process of its own. A round measures every configuration once, in shuffled
order; a ratio is taken within its round, so that a slow minute of a shared machine hits both sides alike.

* stock: the probe's general plugin is not loaded (`SGLANG_PLUGINS` names only the CPU platform).
* installed: the plugin is loaded, without a config.
* ledger: spans, forwards and requests are recorded.
* ledger + rows: and the residual stream of two layers.
* ledger + queries: the ledger and the rotated queries of all layers.
* ledger + queries + keys: and their rotated keys.
* ledger + telemetry: the ledger and attention telemetry of all layers and heads, of every fourth decode step (the
  default) or of every step.

`--modes` measures some of them, beside stock, and writes no file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from page import machine, write_section

from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.platform.environment import prepare_this_process
from sglang_probe.paths import shipped
from sglang_probe.run import journal

HOOK_POINTS = ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
QUERIES, KEYS = ([f"blocks.{i}.attn.{site}" for i in range(4)] for site in ("hook_rot_q", "hook_rot_k"))
MODES: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "installed": None,
    "ledger": {},
    "ledger + rows": {"hook_points": HOOK_POINTS},
    "ledger + queries": {"hook_points": QUERIES},
    "ledger + queries + keys": {"hook_points": [*QUERIES, *KEYS]},
    "ledger + telemetry": {"telemetry": {}},
    "ledger + telemetry of every step": {"telemetry": {"every": 1}},
}
GOALS = {
    "installed": "no difference beyond noise",
    "ledger": ">= 0.97",
    "ledger + rows": ">= 0.90",
    "ledger + queries": ">= 0.90",
    "ledger + queries + keys": ">= 0.90",
    "ledger + telemetry": ">= 0.85",
}
CONCURRENT, PROMPT, OUTPUT, PASSES = 32, 256, 128, 3
CHECKPOINT_SECONDS = 2
"""Shorter than a pass, so that what is timed includes writing to disk; at the default a measurement ends before the
first part is written."""


def measure(mode: str) -> dict[str, float]:
    """Start an engine under `mode` and time it. Runs in a process of its own."""
    prepare_this_process()
    with tempfile.TemporaryDirectory() as folder:
        if mode == "stock":
            os.environ["SGLANG_PLUGINS"] = "sglang_probe_cpu"
        options = MODES[mode]
        if options is not None:
            config = Path(folder) / "probe.yaml"
            probe = EngineProbeConfig(run=Path(folder), checkpoint_seconds=CHECKPOINT_SECONDS, **options)
            config.write_text(probe.model_dump_json())
            os.environ["SGLANG_PROBE"] = str(config)
        import sglang

        engine = sglang.Engine(
            model_path=str(shipped("models/probe-text/checkpoint")),
            device="cpu",
            attention_backend="torch_native",
            max_total_tokens=65536,
            log_level="error",
        )
        rng = random.Random(0)

        scheduler = scheduler_process()

        def one_pass(count: int, output: int) -> tuple[float, float]:
            """Wall seconds, and CPU seconds of the scheduler process, which other work on the machine disturbs less."""
            # Fresh prompts each time: nothing is served from the cache.
            prompts = [[rng.randrange(100, 3000) for _ in range(PROMPT)] for _ in range(count)]
            params = {"max_new_tokens": output, "temperature": 0.0, "ignore_eos": True}
            began, cpu = time.perf_counter(), sum(scheduler.cpu_times()[:2])
            engine.generate(input_ids=prompts, sampling_params=params)
            return time.perf_counter() - began, sum(scheduler.cpu_times()[:2]) - cpu

        one_pass(CONCURRENT, 16)
        decode = [one_pass(CONCURRENT, OUTPUT) for _ in range(PASSES)]
        prefill = [one_pass(CONCURRENT, 1) for _ in range(2 * PASSES)]
        engine.shutdown()
        if options is not None and not list(Path(folder).rglob(journal.NAME)):
            raise SystemExit(f"{mode}: nothing was recorded")
    return {
        "decode": CONCURRENT * OUTPUT / statistics.median(wall for wall, _ in decode),
        "prefill": CONCURRENT * PROMPT / statistics.median(wall for wall, _ in prefill),
        "decode per CPU second": CONCURRENT * OUTPUT / statistics.median(cpu for _, cpu in decode),
    }


def scheduler_process() -> psutil.Process:
    """The engine's scheduler, by the title that SGLang gives it."""
    children = psutil.Process().children(recursive=True)
    return next(p for p in children if "sglang::scheduler" in " ".join(p.cmdline()))


def run_rounds(rounds: int, modes: list[str]) -> list[dict[str, dict[str, float]]]:
    """All measurements, one dictionary a round."""
    results = []
    rng = random.Random(1)
    for i in range(rounds):
        order = list(modes)
        rng.shuffle(order)
        results.append({})
        for mode in order:
            out = subprocess.run(
                [sys.executable, __file__, "--one", mode], capture_output=True, text=True, check=False, timeout=600
            )
            lines = [line for line in out.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                raise SystemExit(f"{mode} failed:\n{out.stdout[-2000:]}\n{out.stderr[-4000:]}")
            results[-1][mode] = json.loads(lines[-1].removeprefix("RESULT "))
            r = results[-1][mode]
            print(
                f"round {i + 1}/{rounds} {mode}: {r['decode']:,.0f} decode, {r['prefill']:,.0f} prefill tok/s",
                flush=True,
            )
    return results


def table(results: list[dict[str, dict[str, float]]]) -> str:
    """Markdown: per configuration the median throughput, and the median and range of the within-round ratios."""
    kinds = list(results[0]["stock"])
    lines = [
        "| configuration | " + " | ".join(f"{k} tok/s | ratio to stock (range)" for k in kinds) + " | goal |",
        "|---|" + "---|---|" * len(kinds) + "---|",
    ]
    for mode in (m for m in MODES if m in results[0]):
        cells = [mode]
        for what in kinds:
            ratios = [r[mode][what] / r["stock"][what] for r in results]
            cells.append(f"{statistics.median(r[mode][what] for r in results):,.0f}")
            cells.append(
                "1"
                if mode == "stock"
                else f"**{statistics.median(ratios):.3f}** ({min(ratios):.3f} to {max(ratios):.3f})"
            )
        lines.append("| " + " | ".join([*cells, GOALS.get(mode, "")]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/benchmarks.md"))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--one", choices=list(MODES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(measure(args.one)))
        return
    results = run_rounds(args.rounds, [m for m in MODES if m == "stock" or m in args.modes])
    text = (
        f"{machine()}. Model `probe-text` (3.7 M parameters) on the CPU reference platform, "
        f"{CONCURRENT} concurrent requests of {PROMPT} prompt tokens; decode: {OUTPUT} output tokens each (its rate "
        "includes their prefill), prefill: 1 output token; per CPU second: over the CPU time of the scheduler process. "
        f"{args.rounds} rounds, each configuration once a round in "
        f"shuffled order in a fresh engine, median of {PASSES} passes; ratios are taken within a round.\n\n"
        f"{table(results)}\n\n"
        "With so small a model a decode step takes milliseconds, so fixed costs per step weigh more than on any model "
        "in production.\n"
    )
    if args.modes == list(MODES):
        write_section(args.out, "Cost of recording", text)
    print(text)


if __name__ == "__main__":
    main()
