"""What the probe costs: throughput of one engine under each configuration, as ratios to stock SGLang.

    python bench/overhead.py [--rounds 5] [--modes MODE ...] [--out docs/evidence/benchmarks.md]

Configurations are measured two at a time beside stock SGLang, in engines of which one runs at a time, there and back
within a round (`paired.py`). Each group of them takes less than ten minutes and is kept in `runs/bench/overhead.json`;
what is there is not measured again.

* stock: the probe's general plugin is not loaded (`SGLANG_PLUGINS` names only the CPU platform).
* installed: the plugin is loaded, without a config.
* ledger: spans, forwards and requests are recorded.
* ledger + rows: and the residual stream of two layers.
* ledger + queries: the ledger and the rotated queries of all layers.
* ledger + queries + keys: and their rotated keys.
* ledger + telemetry: the ledger and attention telemetry of all layers and heads, of every fourth decode step (the
  default) or of every step.

`--modes` measures some of them. The page is written once all of them are there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from page import machine, write_section
from paired import OUTPUT, ROWS, STOCK, Condition, Paired, ratios, rounds_of, told

from sglang_probe.run import journal

HOOK_POINTS = ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
QUERIES, KEYS = ([f"blocks.{i}.attn.{site}" for i in range(4)] for site in ("hook_rot_q", "hook_rot_k"))
MODES: dict[str, dict[str, Any] | None] = {
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
KINDS = {
    "decode": ("decode", "wall"),
    "prefill": ("prefill", "wall"),
    "decode per CPU second": ("decode", "cpu"),
}
"""Columns of the table: what is measured, and by which clock."""
PROMPT, PASSES, AT_ONCE = 256, 3, 2
"""Tokens of a prompt, batches of a measurement of prefill, and configurations that are measured beside stock."""


def measure(modes: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    """Of each configuration the median throughput, and its ratio to that of stock SGLang by round."""
    probes = {"stock": STOCK, **{m: MODES[m] for m in modes}}
    conditions = {}
    for name in probes:
        conditions[f"{name}: decode"] = Condition(name, prompt=PROMPT)
        conditions[f"{name}: prefill"] = Condition(name, prompt=PROMPT, output=1, passes=PASSES)
    paired = Paired(probes)
    try:
        found = rounds_of(paired, conditions, rounds, seconds=seconds)
    finally:
        paired.close()
    for name, probe in probes.items():
        if probe not in (None, STOCK) and not list(paired.runs[name].rglob(journal.NAME)):
            raise SystemExit(f"{name}: nothing was recorded")
    paired.forget()
    tokens = {"decode": 2 * ROWS * OUTPUT, "prefill": 2 * PASSES * ROWS * PROMPT}
    kept: dict[str, Any] = {}
    for name in probes:
        kept[name] = {"machine": machine(), "rounds": len(found)}
        for kind, (of, clock) in KINDS.items():
            seconds = [r[f"{name}: {of}"][clock] for r in found]
            by = ratios(found, f"{name}: {of}", f"stock: {of}", clock)
            kept[name][kind] = {"rate": tokens[of] / statistics.median(seconds), "ratios": by}
    return kept


def table(kept: dict[str, Any]) -> str:
    """Markdown: per configuration the median throughput, and the median and range of the within-round ratios."""
    lines = [
        "| configuration | " + " | ".join(f"{k} tok/s | ratio to stock (range)" for k in KINDS) + " | goal |",
        "|---|" + "---|---|" * len(KINDS) + "---|",
    ]
    for mode in ("stock", *(m for m in MODES if m in kept)):
        cells = [mode]
        for kind in KINDS:
            of = kept[mode][kind]
            cells += [f"{of['rate']:,.0f}", "1" if mode == "stock" else told(of["ratios"])]
        lines.append("| " + " | ".join([*cells, GOALS.get(mode, "")]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no round after so many")
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/benchmarks.md"))
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--keep", type=Path, default=Path("runs/bench/overhead.json"))
    args = parser.parse_args()
    kept: dict[str, Any] = json.loads(args.keep.read_text()) if args.keep.exists() else {}
    wanted = [m for m in args.modes if m not in kept]
    for i in range(0, len(wanted), AT_ONCE):
        group = measure(wanted[i : i + AT_ONCE], args.rounds, args.seconds)
        kept = {**kept, **{m: group[m] for m in group if m != "stock"}, "stock": kept.get("stock", group["stock"])}
        args.keep.parent.mkdir(parents=True, exist_ok=True)
        args.keep.write_text(json.dumps(kept, indent=1))
        print(table(kept), flush=True)
    fewest = min(of["rounds"] for of in kept.values())
    text = (
        f"{kept['stock']['machine']}. Model `probe-text` (3.7 M parameters) in bfloat16 on the CPU reference platform, "
        f"{ROWS} concurrent requests of {PROMPT} prompt tokens; decode: {OUTPUT} output tokens each (its rate includes "
        "their prefill), prefill: 1 output token; per CPU second: over the CPU time of the scheduler process with the "
        f"writer's thread. {AT_ONCE} configurations at a time beside stock, in engines of which one runs at a time, "
        f"there and back within each of {fewest} rounds or more; ratios are taken within a round, rates are of the "
        f"first group.\n\n{table(kept)}\n\n"
        "With so small a model a decode step takes milliseconds, so fixed costs per step weigh more than on any model "
        "in production.\n"
    )
    if all(m in kept for m in MODES):
        write_section(args.out, "Cost of recording", text)
    print(text)


if __name__ == "__main__":
    main()
