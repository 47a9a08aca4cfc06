"""Many attacks, one engine and one random configuration each: `python -m tests.attack.sweep --out DIR`.

A finished seed leaves `DIR/seed-N.json` and is skipped the next time, so that a sweep can be interrupted, extended, or
run seed by seed. `DIR/sweep.json` has everything that DIR holds. The run directory of a seed stays only if something is
wrong. Exit code 1 if anything is, with the command that replays it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.attack.outcome import ROOT, Outcome, attack

COLUMNS = {
    "requests": lambda r: 0 if r["refused"] else r["requests"],
    "forwards": lambda r: r["oracle"]["forwards"],
    "compared": lambda r: r["oracle"]["compared"],
    "wrong": lambda r: r["oracle"]["wrong"],
    "unknown": lambda r: r["oracle"]["unknown"],
    "written": lambda r: r["oracle"]["written"],
    "violations": lambda r: len(r["violations"]),
    **{
        name: lambda r, name=name: r["counts"].get(name, 0)
        for name in ("reused", "rebinds", "retracted", "aborted", "flushed", "mixed", "continued", "samples")
    },
}

SHORT = {
    "page_size": "page",
    "chunked_prefill_size": "chunk",
    "max_total_tokens": "KV",
    "disable_overlap_schedule": "no overlap",
    "enable_mixed_chunk": "mixed",
    "radix_eviction_policy": "evict",
    "schedule_policy": "order",
    "schedule_conservativeness": "conservative",
    "max_running_requests": "running",
    "max_queued_requests": "queued",
    "max_prefill_tokens": "prefill tokens",
    "prefill_max_requests": "prefill requests",
    "enable_priority_scheduling": "priority",
    "schedule_low_priority_values_first": "low first",
    "priority_scheduling_preemption_threshold": "threshold",
    "disable_priority_preemption": "no preemption",
    "retraction_policy": "retract by",
    "tp_size": "tp",
    "dp_size": "dp",
    "prefill_decode_interval": "interval",
    "SGLANG_TEST_RETRACT": "forced retraction",
}
"""Engine options in the table."""
PLAIN = {"max_prefill_tokens": 16384, "schedule_conservativeness": 1.0, "retraction_policy": "length"}
"""SGLang's defaults, which the table leaves out."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", type=int, default=60)
    parser.add_argument("--requests", type=int, default=45, help="requests per configuration")
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--document", type=Path, help="a Markdown file whose part behind `## The run` is written anew")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = range(args.first_seed, args.first_seed + args.configs)
    for n, seed in enumerate(seeds, 1):
        path = args.out / f"seed-{seed}.json"
        if path.exists() and json.loads(path.read_text())["requests"] == args.requests:
            print(f"[{n}/{len(seeds)}] seed {seed}: done before", flush=True)
            continue
        began = time.monotonic()
        outcome = attack(_empty(args.out / f"seed-{seed}"), seed, args.requests)
        path.write_text(json.dumps(_record(seed, args.requests, outcome), indent=1) + "\n")
        if not outcome.noticed:
            shutil.rmtree(args.out / f"seed-{seed}")
        fine = outcome.refused or f"{outcome.oracle['compared']:,} positions compared, none wrong"
        said = "; ".join(outcome.noticed) or fine
        print(f"[{n}/{len(seeds)}] seed {seed}, {time.monotonic() - began:.0f} s: {said}", flush=True)
    records = sorted((json.loads(p.read_text()) for p in args.out.glob("seed-*.json")), key=lambda r: r["seed"])
    (args.out / "sweep.json").write_text(json.dumps(_summary(records), indent=1) + "\n")
    print(table(records))
    if args.document:
        above, heading, _ = args.document.read_text().partition("## The run\n")
        args.document.write_text(f"{above}{heading}\n{_in_words(records)}\n\n{table(records)}\n")
    wrong = [r for r in records if r["noticed"]]
    for r in wrong:
        replay = f"--configs 1 --first-seed {r['seed']} --requests {r['requests']} --out {args.out}-replay"
        print(f"\nseed {r['seed']}: {'; '.join(r['noticed'])}\n  python -m tests.attack.sweep {replay}")
    return 1 if wrong else 0


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table, one line per configuration and a last one of totals."""
    lines = ["| seed | options | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for r in records:
        cells = " | ".join(f"{of(r):,}" for of in COLUMNS.values())
        lines.append(f"| {r['seed']} | {_named(r)} | {cells} |")
    totals = " | ".join(f"{sum(map(of, records)):,}" for of in COLUMNS.values())
    lines.append(f"| **all** | {_summary(records)['configurations']} configurations | {totals} |")
    return "\n".join(lines)


def _in_words(records: list[dict[str, Any]]) -> str:
    summary = _summary(records)
    totals = summary["totals"]
    commits = ", ".join(sorted({f"`{r['commit']}`" for r in records}))

    def counted(name: str) -> str:
        counter: Counter[str] = Counter()
        for r in records:
            counter.update(r["counts"].get(name, {}))
        return ", ".join(f"{n:,} {what}" for what, n in counter.most_common())

    return (
        f"{summary['configurations']} configurations, {totals['requests']:,} requests, "
        f"{totals['forwards']:,} forward passes, {totals['compared']:,} comparisons of a slot's true owner with the "
        f"lineage: {totals['wrong']} wrong, {totals['unknown']} unknown; "
        f"{totals['written']:,} comparisons of what the finished runs say with the true owners: "
        f"{totals['violations']} violations of these and of `verify`.\n"
        f"{summary['refused']} more were refused by the probe, by name, as they must be. Attacked: {commits}.\n"
        f"Requests by finish reason: {counted('finish')}. Computed positions: {counted('phases')}; reused: "
        f"{totals['reused']:,}. SGLang's defaults are left out of the table; `KV` is the pool in tokens."
    )


def _named(record: dict[str, Any]) -> str:
    return f"refused: {record['refused']}" if record["refused"] else _words(record["options"])


def _words(options: dict[str, Any]) -> str:
    said = []
    for name, value in options.items():
        if PLAIN.get(name) != value and name != "radix_eviction_policy_config":
            short = SHORT.get(name, name)
            said.append(short if value is True or value == "1" else f"{short} {value}")
    return ", ".join(said)


def _record(seed: int, requests: int, outcome: Outcome) -> dict[str, Any]:
    return {
        "seed": seed,
        "commit": _commit(),
        "requests": requests,
        "options": outcome.options,
        "refused": outcome.refused,
        "oracle": outcome.oracle,
        "violations": outcome.violations,
        "noticed": outcome.noticed,
        "counts": outcome.counts,
    }


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    totals = {name: sum(map(of, records)) for name, of in COLUMNS.items()}
    refused = sum(r["refused"] is not None for r in records)
    return {"configurations": len(records) - refused, "refused": refused, "totals": totals, "records": records}


def _commit() -> str | None:
    """What was attacked; None outside a checkout."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def _empty(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


if __name__ == "__main__":
    sys.exit(main())
