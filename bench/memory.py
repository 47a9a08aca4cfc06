"""Peak memory of what reads large runs, at two sizes: what grows with positions, and by how much.

    python bench/memory.py [--requests 1000 4000] [--width 16] [--out docs/evidence/benchmarks.md]

The runs are made by bench/synthetic.py. Each reading is a process of its own (bench/alone.py), and memory is the
largest resident set that the system counted for it, which includes the pages of files that are mapped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from alone import run_alone
from page import machine, write_section
from synthetic import HOOK_POINT

from sglang_probe.run.run import Run, load_run


def start(_run: Run, _out: Path) -> None:
    """Nothing: Python and the libraries that all of them import."""


def frame(run: Run, _out: Path) -> None:
    """All positions in one frame."""
    run.tokens()


def frames(run: Run, _out: Path) -> None:
    """`run.iter_tokens()`."""
    for _ in run.iter_tokens():
        pass


def ab(run: Run, _out: Path) -> None:
    """What `sglang-probe ab` reads of a pair of runs after their check: coverage, and the distance of their rows."""
    from sglang_probe.studies.coverage.prompts import PromptCoverage
    from sglang_probe.studies.drift import compare_runs, drift_table, in_common

    PromptCoverage(run.iter_tokens())
    (found,) = in_common([compare_runs(run, run)])
    drift_table(found)


def hf(run: Run, out: Path) -> None:
    """`sglang-probe export hf`."""
    from sglang_probe.export.hf import export_hf

    export_hf(run, out / "hf", overwrite=True)


def training(run: Run, _out: Path) -> None:
    """Choosing the rows that an SAE is trained on."""
    from sglang_probe.sae.harvested import listed

    listed([run], HOOK_POINT)


def coverage(run: Run, _out: Path) -> None:
    """The study of `sglang-probe coverage`, by segment."""
    from sglang_probe.studies.coverage.study import study_coverage

    study_coverage(run, ["segment"])


READINGS: dict[str, Callable[[Run, Path], None]] = {
    f.__name__: f for f in (start, frame, frames, ab, hf, training, coverage)
}


def measure(name: str, run: Path, out: Path) -> float:
    """Peak memory of a reading in MiB."""
    return run_alone([sys.executable, __file__, "--one", name, str(run), str(out)]).peak_mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs=2, default=[1000, 4000])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/benchmarks.md"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, run, out = args.one
        READINGS[name](load_run(run), Path(out))
        return
    with tempfile.TemporaryDirectory() as folder:
        runs, positions = [Path(folder) / f"run-{n}" for n in args.requests], []
        for n, run in zip(args.requests, runs, strict=True):
            generator = [sys.executable, str(Path(__file__).with_name("synthetic.py")), str(run)]
            options = ["--requests", str(n), "--width", str(args.width)]
            made = subprocess.run([*generator, *options], check=True, capture_output=True, text=True)
            positions.append(int(made.stdout.split()[0].replace(",", "")))
        sizes = " | ".join(f"{n:,} positions, MiB" for n in positions)
        lines = [f"| what reads the run | {sizes} | bytes for each further position |", "|---|---|---|---|"]
        for name, reading in READINGS.items():
            small, large = (measure(name, run, Path(folder)) for run in runs)
            more = (large - small) * 2**20 / (positions[1] - positions[0])
            lines.append(f"| {str(reading.__doc__).rstrip('.')} | {small:,.0f} | {large:,.0f} | **{more:.0f}** |")
            print(lines[-1], flush=True)
    text = (
        f"{machine()}. `python bench/memory.py` on made-up runs (`bench/synthetic.py`) of "
        f"{args.requests[0]:,} and {args.requests[1]:,} requests, with a row of {args.width} bfloat16 numbers for each "
        "computed position at one hook point. Peak of the resident set, Python and libraries included; mapped pages of "
        "shards count, which the system takes back when it needs them. Some tens of MiB of each peak are chance, so "
        "that the bytes for a position are rough. The memory of the first row is part of every other row, and some of "
        "them import more libraries.\n\n" + "\n".join(lines) + "\n"
    )
    write_section(args.out, "Memory of reading large runs", text)


if __name__ == "__main__":
    main()
