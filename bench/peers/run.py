"""Harvest the same rows by sglang-probe and by what people would pick, in interleaved rounds, and write a page.

    python bench/peers/run.py --model probe-text --rounds 5
    python bench/peers/run.py --model smollm2-135m --layers 14 29 --prompts 16 --length 128 --families 2 --batches 8

Every peer has an environment of its own (`--environments`, made at the first run) and a process that loads the model
once. A warm-up round gives each peer its best of 1 and 2 threads and of some batch sizes, and checks its rows against
ours. The page is written from the JSON beside it, which has what every run of this script measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import compare
from environments import OURS, PEERS, ROOT, python_of
from peers_page import write
from processes import Running
from prompts import share_of, shared, unshared

sys.path.append(str(Path(__file__).parents[1]))
from page import machine

SHARE = 0.8


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="probe-text", help="a name of `sglang-probe model list`, or a folder")
    parser.add_argument("--name", help="name of the model on the page; default: the last part of --model")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3], help="whose outputs are written; default: 1 3")
    parser.add_argument(
        "--prompts", type=int, default=256, help="a multiple of --families and of each batch size; default: 256"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens of each prompt; default: 256")
    parser.add_argument("--families", type=int, default=8, help="families of prompts that share a prefix; default: 8")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16], help="batch sizes to try; default: 4 16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no round begins after so many")
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--ours", nargs="+", choices=OURS, default=list(OURS), help="settings of sglang-probe")
    parser.add_argument("--quiet", action="store_true", help="no other engine or training runs here: the page says so")
    parser.add_argument("--environments", type=Path, default=ROOT / ".cache" / "peers")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "evidence" / "peers.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as scratch:
        for found in measure(given, Path(scratch)):
            data = given.out.with_suffix(".json")
            every = json.loads(data.read_text()) if data.exists() else {}
            every[found["model"]] = found
            data.write_text(json.dumps(every, indent=1) + "\n")
            write(every, given.out)


def measure(given: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """What the page says of one model, after each round."""
    from sglang_probe.harvest.model import resolve_model

    model = resolve_model(given.model)
    files, workloads = {}, _workloads(model.tokenizer, given)
    for name, prompts in workloads.items():
        files[name] = scratch / f"{name}.json"
        files[name].write_text(json.dumps(prompts))
    asked = {"model": str(Path(model.path).resolve()), "layers": given.layers}
    running, missing = _start(asked, list(files.values()), given, scratch)
    bench = _Bench(running, files, workloads, given, scratch)
    began, rounds = time.perf_counter(), []
    try:
        chosen = bench.choose()
        for number in range(given.rounds):
            if rounds and time.perf_counter() - began > given.seconds:
                break
            rounds.append(bench.round(chosen, number, given.rounds))
            yield {
                "model": given.name or Path(given.model).name,
                "machine": machine(),
                "load": [round(x, 1) for x in os.getloadavg()],
                "quiet": given.quiet,
                "layers": given.layers,
                "prompts": given.prompts,
                "length": given.length,
                "families": given.families,
                "batches": given.batches,
                "shares": {name: share_of(prompts) for name, prompts in workloads.items()},
                "loaded": {name: child.loaded for name, child in running.items()},
                "chosen": chosen,
                "distance": bench.distances,
                "missing": missing,
                "rounds": rounds,
            }
    finally:
        for child in running.values():
            child.close()


def _workloads(tokenizer: Any, given: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Text of Python's standard library, as token ids, without special tokens: nothing is shared by accident."""
    from sglang_probe.workload.corpus import load_corpus

    stream: list[int] = []
    for document in load_corpus().documents:
        if len(stream) >= given.prompts * given.length:
            break
        stream += tokenizer.encode(document.text, add_special_tokens=False)
    size = given.prompts, given.length
    return {
        "unshared": unshared(stream, *size),
        "shared": shared(stream, *size, share=SHARE, families=given.families),
    }


def _start(
    asked: Mapping[str, Any], prompts: list[Path], given: argparse.Namespace, scratch: Path
) -> tuple[dict[str, Running], dict[str, str]]:
    """Processes by name, ours by its threads; and why a peer is not there."""
    running, missing = {}, {}
    for peer in (p for p in PEERS if p.name in given.peers):
        try:
            python = python_of(peer, given.environments.resolve())
            running[peer.name] = Running(peer.script, python, asked, max(peer.threads), scratch / f"{peer.script}.log")
        except RuntimeError as e:
            missing[peer.name] = str(e).strip().splitlines()[-1]
            print(f"{peer.name} is left out: {e}", flush=True)
            continue
        print(f"{peer.name}: {running[peer.name].loaded}", flush=True)
    for name in given.ours:
        threads = OURS[name]
        what = {**asked, "prompts": [str(p) for p in prompts], "scratch": str(scratch)}
        running[name] = Running("ours.py", Path(sys.executable), what, threads, scratch / f"ours-{threads}.log")
        print(f"{name}: {running[name].loaded}", flush=True)
    return running, missing


class _Bench:
    """Visits of processes, with their rows checked."""

    def __init__(
        self,
        running: Mapping[str, Running],
        files: Mapping[str, Path],
        workloads: Mapping[str, list[list[int]]],
        given: argparse.Namespace,
        scratch: Path,
    ) -> None:
        self.layers, self.batches = given.layers, given.batches
        self.running, self.files, self.workloads, self.scratch = running, files, workloads, scratch
        self.distances: dict[str, float] = {}
        self._reference: dict[str, list[Any]] = {}

    def choose(self) -> dict[str, dict[str, int]]:
        """The warm-up round: reference rows of ours first, then each peer's best setting where nothing is shared."""
        chosen: dict[str, dict[str, int]] = {}
        for name in reversed(self.running):  # ours first
            if name in OURS:
                for workload in self.files:
                    self.visit(name, workload, {})
                chosen[name] = {}
                continue
            tried = []
            for batch in self.batches:
                for threads in (1, 2):
                    setting = {"batch": batch, "threads": threads}
                    tried.append((self.visit(name, "unshared", setting)["seconds"], setting))
            seconds, chosen[name] = min(tried, key=lambda t: t[0])
            print(f"{name}: {seconds:.2f} s with {chosen[name]}", flush=True)
        return chosen

    def round(self, chosen: Mapping[str, dict[str, int]], number: int, of: int) -> dict[str, dict[str, Any]]:
        """Everything once, in an order of its own."""
        todo = [(name, workload) for name in self.running for workload in self.files]
        random.Random(number).shuffle(todo)
        found: dict[str, dict[str, Any]] = {workload: {} for workload in self.files}
        for name, workload in todo:
            found[workload][name] = self.visit(name, workload, chosen[name])
        told = {w: {n: round(v["seconds"], 2) for n, v in of_peers.items()} for w, of_peers in found.items()}
        print(f"round {number + 1}/{of}: {json.dumps(told)}", flush=True)
        return found

    def visit(self, name: str, workload: str, setting: Mapping[str, int]) -> dict[str, Any]:
        """One harvest to disk. What other harvests left to write is written first, and its rows are looked at.

        Raises:
            SystemExit: rows are missing, or are not ours.
        """
        out = self.scratch / "out"
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        found = self.running[name].ask({"prompts": str(self.files[workload]), "out": str(out), **setting})
        prompts = self.workloads[workload]
        positions = sum(map(len, prompts))
        if found["rows"] + found.get("reused", 0) != positions:
            raise SystemExit(f"{name} wrote {found['rows']} rows of {positions} positions ({workload})")
        sample = compare.sample_of(len(prompts), len(prompts[0]))
        read = compare.ours if name in OURS else compare.theirs
        rows = [read(out, layer, sample, len(prompts[0])) for layer in self.layers]
        reference = self._reference.setdefault(workload, rows)
        far = compare.worst(rows, reference)
        if far > compare.TOLERANCE:
            raise SystemExit(f"{name}: rows are {far:.2g} away from ours ({workload})")
        self.distances[name] = max(far, self.distances.get(name, 0.0))
        found["bytes"] = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
        return found


if __name__ == "__main__":
    main()
