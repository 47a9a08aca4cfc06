"""What storing shared rows once saves, and what reading whole samples from it costs.

    python bench/store_once.py [--out docs/evidence/benchmarks.md] [--rounds 5]

Records few-shot traffic of `probe-text` at three shares of reuse, writes each run a second time with every sample whole
(`sglang-probe export eagle`: what trainers of drafters keep today), and reads both in random order.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from page import machine, write_section
from safetensors.torch import load_file

from sglang_probe import Experiment
from sglang_probe.export.eagle import STATES, export_eagle
from sglang_probe.run.run import Run, load_run

SHARES = {
    50: {"exemplars": 4, "families": 8, "requests_per_family": 2},
    80: {"exemplars": 4, "families": 4, "requests_per_family": 8},
    95: {"exemplars": 12, "families": 4, "requests_per_family": 40},
}
"""Aimed at: what was shared is measured."""
POINTS = [f"blocks.{i}.hook_resid_post" for i in (0, 1, 3)]
READS = 640
"""Samples that are read in a visit, at least."""


def record(folder: Path) -> dict[int, Run]:
    """A run for each share, by one engine after another; those that are there already are taken."""
    runs = {}
    for share, workload in SHARES.items():
        if (folder / f"share-{share}").exists():
            runs[share] = load_run(folder / f"share-{share}")
            continue
        asked = {"source": "shared_prefix", "seed": 0, **workload}
        sampling = {"max_new_tokens": 8, "temperature": 0.0}
        with Experiment(
            model="probe-text", workload=asked, hook_points=POINTS, sampling=sampling, concurrency=4
        ) as experiment:
            runs[share] = experiment.record(folder / f"share-{share}")
    return runs


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def seconds(read: Callable[[int], object], order: list[int]) -> float:
    """CPU time to read samples in this order: what other programs do on the machine is not in it."""
    began = time.process_time()
    for i in order:
        read(i)
    return time.process_time() - began


def measure(run: Run, folder: Path, rounds: int) -> dict[str, float]:
    samples = export_eagle(run, folder, hook_points=POINTS)
    naive = folder / STATES

    def whole(i: int) -> object:
        return load_file(naive / f"hs_{i}.safetensors")[STATES].clone()  # a mapped file is read when it is copied

    order = list(range(len(samples))) * max(1, READS // len(samples))
    ratios = []
    for n in range(2 * rounds):
        random.Random(n).shuffle(order)
        gc.collect()
        pair: list[tuple[str, Callable[[int], object]]] = [("once", samples.__getitem__), ("whole", whole)]
        took = {name: seconds(read, order) for name, read in (pair if n % 2 else pair[::-1])}
        ratios.append((took["once"] / took["whole"], took["once"] / len(order), took["whole"] / len(order)))
    began = time.perf_counter()
    run.samples(POINTS)
    opened = time.perf_counter() - began
    rows = size(run.path / "rows")
    prompts, cached = run.requests()["prompt_len"].sum(), run.requests()["cached_tokens"].sum()
    return {
        "samples": len(samples),
        "positions": int(samples.offsets[-1]),
        "shared": float(cached / prompts),
        "rows_once": int(run.row_count()),
        "bytes_once": rows,
        "bytes_run": size(run.path),
        "bytes_whole": size(naive),
        "ratio": statistics.median(r for r, _, _ in ratios),
        "ratio_low": min(r for r, _, _ in ratios),
        "ratio_high": max(r for r, _, _ in ratios),
        "ms_once": 1e3 * statistics.median(a for _, a, _ in ratios),
        "ms_whole": 1e3 * statistics.median(b for _, _, b in ratios),
        "open_seconds": opened,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/benchmarks.md"))
    parser.add_argument("--runs", type=Path, help="where to keep the runs, and to take them from if they are there")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = args.runs or Path(place)
        runs = record(folder)
        found = {share: measure(run, Path(place) / f"whole-{share}", args.rounds) for share, run in runs.items()}
    print(json.dumps(found, indent=1))
    lines = [
        "| prompt tokens shared | samples, positions | rows stored | rows on disk, MB | run directory, MB "
        "| every sample whole, MB | run directory over whole samples | random access over whole samples (range) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {m['shared']:.0%} | {m['samples']:,}, {m['positions']:,} | {m['rows_once']:,} "
        f"| {m['bytes_once'] / 1e6:.1f} | {m['bytes_run'] / 1e6:.1f} | {m['bytes_whole'] / 1e6:.1f} "
        f"| **{m['bytes_run'] / m['bytes_whole']:.2f}** "
        f"| **{m['ratio']:.2f}** ({m['ratio_low']:.2f} to {m['ratio_high']:.2f}) |"
        for m in found.values()
    ]
    text = (
        f"{machine()}, shared with other work. `python bench/store_once.py`: few-shot traffic recorded from "
        f"`probe-text` (width 256, bfloat16) at {len(POINTS)} hook points, 8 output tokens; "
        "`run.samples()` of the run directory against one safetensors file a sample (`sglang-probe export eagle`). "
        "Both hold the same tensors. Random access: CPU time to load samples in random order as tensors in memory, "
        f"from files in the page cache; {2 * args.rounds} interleaved pairs, median ratio.\n\n"
        + "\n".join(lines)
        + "\n\nThe run directory holds the ledger and the token ids too. Below 1 `run.samples()` is faster than the "
        "whole files, which are opened and parsed one by one. Reading from a disk, past the page cache, was not "
        "measured.\n"
    )
    write_section(args.out, "Rows stored once", text)


if __name__ == "__main__":
    main()
