"""Time and memory of `sglang-probe coverage` on a ledger of a hundred million positions, or of a billion.

    python bench/coverage.py [--rounds 3] [--out docs/evidence/benchmarks.md]
    python bench/coverage.py --requests 2000000 --rounds 1        # a billion: the default axes alone

Each size has a section of its own, which stays as it is while another size is measured. The run is made by
bench/synthetic.py, or was made by it before (`--run`). Each measurement is the whole command in a process of its own:
start of Python, study, bootstrap, report and weights. Memory is the largest resident set.
"""

from __future__ import annotations

import argparse
import json
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
SIZES = {
    200_000: ("Coverage of a hundred million positions", "under 20 s and 2 GiB", 20.0),
    2_000_000: ("Coverage of a billion positions", "under 60 s and 2 GiB on two cores", 60.0),
}
"""Heading, goal and its seconds by requests; any other number is measured, printed, and written nowhere."""
GOAL_GIB = 2.0
LARGE = 1_000_000
"""Requests from which on the default axes alone are measured."""


def measure(run: Path, out: Path, options: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak memory in GiB of one command."""
    command = [sys.executable, "-m", "sglang_probe", "coverage", str(run), "--output", str(out), *options]
    spent = run_alone(command)
    return spent.seconds, spent.cpu_seconds, spent.peak_mib / 2**10


def _told(met: bool) -> str:
    return "met" if met else "missed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", type=Path, help="a run that bench/synthetic.py made of so many requests")
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/benchmarks.md"))
    args = parser.parse_args()
    heading, goal, goal_seconds = SIZES.get(args.requests, ("", "", 0.0))
    axes = AXES if args.requests < LARGE else dict(list(AXES.items())[:1])
    lines = ["| axes | seconds (range) | CPU seconds | peak memory, GiB | goal |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        run = args.run or Path(folder) / "run"
        if args.run is None:
            generator = [sys.executable, str(Path(__file__).with_name("synthetic.py")), str(run)]
            subprocess.run([*generator, "--requests", str(args.requests)], check=True, stdout=subprocess.DEVNULL)
        busy = os.getloadavg()[0]
        for i, (name, options) in enumerate(axes.items()):
            rounds = [measure(run, Path(folder) / "out", options) for _ in range(1 if i else args.rounds)]
            seconds, cpu, memory = zip(*rounds, strict=True)
            cells = f"**{statistics.median(seconds):.1f}**" + (
                "" if len(seconds) == 1 else f" ({min(seconds):.1f} to {max(seconds):.1f})"
            )
            cells += f" | {statistics.median(cpu):.1f} | **{max(memory):.2f}**"
            met = max(seconds) < goal_seconds and max(memory) < GOAL_GIB
            lines.append(f"| {name} | {cells} | {'' if i or not goal else f'{goal}: **{_told(met)}**'} |")
            print(lines[-1], flush=True)
        told = json.loads((Path(folder) / "out" / "summary.json").read_text())["runs"][0]["totals"]
        spans = sum(f.stat().st_size for f in (run / "ledger").iterdir()) / 2**20
        requests = (run / "requests.parquet").stat().st_size / 2**20
    often = "one round" if args.rounds == 1 else f"median of {args.rounds} rounds for the default"
    often += ", one round for the others" if len(axes) > 1 and args.rounds > 1 else ""
    text = (
        f"{machine()}. `sglang-probe coverage` on a made-up run (`bench/synthetic.py`) of {args.requests:,} requests "
        f"in families of 100 that share a prefix, {int(told['positions']):,} positions; the spans are {spans:.0f} MiB "
        f"and the requests with their token ids {requests:.0f} MiB on disk. The whole command, with bootstrap, report "
        f"and weights; {often}; load when it began: {busy:.0f} (other work lengthens the seconds, and hardly the "
        "CPU seconds).\n\n" + "\n".join(lines) + "\n"
    )
    if len(axes) > 1:
        text += (
            "\nThe token ids are random, so for `repeat` almost every sequence of eight tokens outside the shared "
            "prefixes is new, which is its worst case: its memory grows by 8 bytes for each.\n"
        )
    if heading:
        write_section(args.out, heading, text)


if __name__ == "__main__":
    main()
