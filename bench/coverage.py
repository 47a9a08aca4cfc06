"""Time and memory of `sglang-probe coverage` on a ledger of a hundred million positions.

    python bench/coverage.py [--requests 200000] [--rounds 3] [--out docs/evidence/benchmarks.md]

The run is made by bench/synthetic.py. Each measurement is the whole command in a process of its own: start of Python,
study, bootstrap, report and weights. Memory is the largest resident set.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from alone import run_alone
from page import machine, write_section

from sglang_probe.paths import shipped

AXES = {
    "segment, by position (the default)": ["--axis", "segment"],
    "segment, role, lexical, frequency, each by position": [
        *("--axis", "segment", "--axis", "role", "--axis", "lexical", "--axis", "frequency"),
        *("--model", str(shipped("models/probe-text/checkpoint"))),
    ],
    "repeat, by position": ["--axis", "repeat"],
}
GOAL = "under 20 s and 2 GiB"


def measure(run: Path, out: Path, options: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak memory in GiB of one command."""
    command = [sys.executable, "-m", "sglang_probe", "coverage", str(run), "--output", str(out), *options]
    spent = run_alone(command)
    return spent.seconds, spent.cpu_seconds, spent.peak_mib / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/benchmarks.md"))
    args = parser.parse_args()
    lines = ["| axes | seconds (range) | CPU seconds | peak memory, GiB | goal |", "|---|---|---|---|---|"]
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        generator = [sys.executable, str(Path(__file__).with_name("synthetic.py")), str(run)]
        made = subprocess.run(
            [*generator, "--requests", str(args.requests)], check=True, capture_output=True, text=True
        )
        for i, (name, options) in enumerate(AXES.items()):
            rounds = [measure(run, Path(folder) / "out", options) for _ in range(1 if i else args.rounds)]
            seconds, cpu, memory = zip(*rounds, strict=True)
            cells = f"**{statistics.median(seconds):.1f}**" + (
                "" if i else f" ({min(seconds):.1f} to {max(seconds):.1f})"
            )
            cells += f" | {statistics.median(cpu):.1f} | **{max(memory):.2f}**"
            lines.append(f"| {name} | {cells} | {'' if i else GOAL} |")
            print(lines[-1], flush=True)
        spans = sum(f.stat().st_size for f in (run / "ledger").iterdir()) / 2**20
        requests = (run / "requests.parquet").stat().st_size / 2**20
    text = (
        f"{machine()}. `sglang-probe coverage` on a made-up run (`bench/synthetic.py`) of {args.requests:,} requests "
        f"in families of 100 that share a prefix, {made.stdout.strip()}; the spans are {spans:.0f} MiB and the "
        f"requests with their token ids {requests:.0f} MiB on disk. The whole command, with bootstrap, report and "
        f"weights; median of {args.rounds} rounds for the default, one round for the others; load when it began: "
        f"{busy:.0f}, which lengthens the seconds and hardly the CPU seconds.\n\n"
        + "\n".join(lines)
        + "\n\nThe token ids are random, so for `repeat` almost every sequence of eight tokens outside the shared "
        "prefixes is new, which is its worst case: its memory grows by 8 bytes for each.\n"
    )
    write_section(args.out, "Coverage of a hundred million positions", text)


if __name__ == "__main__":
    main()
