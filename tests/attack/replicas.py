"""Two replicas, one of which is killed in the middle, against one engine: `python -m tests.attack.replicas --out DIR`.

Records one workload with one engine, with one engine again (the floor), and with two replicas, the engine of one of
which gets SIGKILL once a part of its ledger is durable; then compares what the runs hold, position by position and row
by row. Needs Ray (`sglang-probe[ray]`). Prints a Markdown table; exit code 1 if a request is not there exactly once, if
an invariant does not hold, or if whole families that no kill touched differ while every request was served alone.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from sglang_probe.run import journal
from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.verify import verify
from sglang_probe.workload.request import asked_rid

POINTS = ["hook_embed", "blocks.3.hook_resid_post"]


def configure(path: Path, *, concurrency: int, replicas: int, families: int = 6, each: int = 10) -> Path:
    """Write the YAML of a harvest."""
    workload = {"source": "shared_prefix", "families": families, "requests_per_family": each, "exemplars": 2}
    fields = {
        "workload": {**workload, "shared_system": False},
        "sampling": {"max_new_tokens": 16, "temperature": 0.0},
        "hook_points": POINTS,
        "server": {"page_size": 16},
        "concurrency": concurrency,
        "checkpoint_seconds": 0.5,
        "order": "as_given",  # several engines are to reuse what one does without waiting
        "replicas": replicas,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(fields))
    return path


def harvest(config: Path, run: Path, *flags: str) -> subprocess.Popen[bytes]:
    """Start the command, in a process group of its own."""
    command = [sys.executable, "-m", "sglang_probe", "harvest", str(config), "--output", str(run), *flags]
    with open(run.parent / f"{run.name}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)


def wait_for_parts(run: Path, rank: int, parts: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until so many parts of a replica are durable.

    Raises:
        RuntimeError: the command ended before.
    """
    while len(journal.read_rank(run, rank)) < parts:
        if process.poll() is not None:
            raise RuntimeError(f"the harvest ended with {process.returncode} before replica {rank} wrote {parts} parts")
        time.sleep(0.02)


def engine_of(run: Path, rank: int) -> int:
    """Process id of the engine that writes the ledger of a replica."""
    name = ".lock" if rank == 0 else f".lock-dp{rank}"
    return int(re.match(r"process (\d+)", (run / name).read_text())[1])  # type: ignore[index]


@dataclass(frozen=True)
class Compared:
    """What two runs of one workload hold, by the requests' own ids and by position."""

    requests: int
    positions: int
    outputs: int
    """Requests with other outputs."""
    statuses: int
    """Positions that one computed and the other reused."""
    rows: int
    """Rows that are not the same bits, of those whose token is the same."""
    largest: float
    """Largest relative L2 distance of such a row."""


def compare(a: Run, b: Run, rids: Iterable[str]) -> Compared:
    """Two runs, over these requests."""
    names = [{asked_rid(rid): rid for rid in run.requests()["rid"]} for run in (a, b)]
    status = [dict(iter(run.tokens().groupby("rid"))) for run in (a, b)]
    outputs = [run.requests().set_index("rid")["output_ids"] for run in (a, b)]
    found = dict.fromkeys(("requests", "positions", "outputs", "statuses", "rows"), 0)
    largest = 0.0
    for rid in rids:
        mine, theirs = names[0][rid], names[1][rid]
        found["requests"] += 1
        same_output = np.array_equal(outputs[0][mine], outputs[1][theirs])
        found["outputs"] += not same_output
        s, t = (frame[frame["phase"] != "overshoot"] for frame in (status[0][mine], status[1][theirs]))
        tokens = (s["token_id"].to_numpy(), t["token_id"].to_numpy())
        shortest = min(map(len, tokens))
        same = tokens[0][:shortest] == tokens[1][:shortest]
        n = shortest if same.all() else int(np.argmin(same))
        found["positions"] += n
        found["statuses"] += int((s["status"].to_numpy()[:n] != t["status"].to_numpy()[:n]).sum())
        for point in POINTS:
            x, y = a.activations(mine, point)[:n], b.activations(theirs, point)[:n]
            found["rows"] += int((x != y).any(dim=1).sum())
            x, y = x.double(), y.double()
            largest = max(largest, float(((x - y).norm(dim=1) / x.norm(dim=1).clamp_min(1e-30)).max()))
    return Compared(**found, largest=largest)


def once_each(run: Run) -> bool:
    """Whether every request of the workload has one end in the ledgers of the engines, and not two."""
    ended = run.engine_requests()["rid"].map(asked_rid)
    return len(ended) == run.manifest["requests_expected"] and not ended.duplicated().any()


def record(out: Path, concurrency: int) -> dict[str, Run]:
    """One engine, one engine again, and two replicas with a kill in the middle."""
    folder = out / f"concurrency-{concurrency}"
    runs = {}
    for name in ("one", "again"):
        if not (folder / name / "seal.json").exists():
            config = configure(folder / "one.yaml", concurrency=concurrency, replicas=1)
            assert harvest(config, folder / name, "--overwrite").wait() == 0, (folder / f"{name}.log").read_text()
        runs[name] = load_run(folder / name)
    two = folder / "two"
    if not (two / "seal.json").exists():
        shutil.rmtree(two, ignore_errors=True)
        process = harvest(configure(folder / "two.yaml", concurrency=concurrency, replicas=2), two)
        while not (two / "manifest.json").exists() and process.poll() is None:
            time.sleep(0.02)
        wait_for_parts(two, 1, 3, process)
        os.kill(engine_of(two, 1), signal.SIGKILL)
        assert process.wait() == 0, (folder / "two.log").read_text()
    runs["two"] = load_run(two)
    return runs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4], help="in flight in each engine")
    args = parser.parse_args()
    wrong = []
    print("| concurrency | compared | requests | positions | other outputs | other statuses | other rows | largest |")
    print("|---" * 8 + "|")
    for concurrency in args.concurrency:
        runs = record(args.out, concurrency)
        one, again, two = runs["one"], runs["again"], runs["two"]
        wrong += [f"{run.path}: {c}" for run in runs.values() for c in verify(run) if not c.holds]
        wrong += [f"{run.path}: a request is not there once" for run in runs.values() if not once_each(run)]
        wrong += [] if two.manifest["replicas"]["ended"] else [f"{two.path}: no replica ended"]
        repeated = {asked_rid(rid) for rid in two.requests()["rid"] if "~" in rid}
        frame = one.requests()
        touched = set(frame.loc[frame["rid"].isin(repeated), "family"])
        whole = frame.loc[~frame["family"].isin(touched), "rid"]
        rest = frame.loc[frame["family"].isin(touched), "rid"]
        for what, other, rids in (
            ("one engine, one engine again (the floor)", again, frame["rid"]),
            ("one engine, two replicas: families that no kill touched", two, whole),
            ("one engine, two replicas: families in the engine that was killed", two, rest),
        ):
            c = compare(one, other, rids)
            cells = (c.requests, c.positions, c.outputs, c.statuses, c.rows)
            print(f"| {concurrency} | {what} | {' | '.join(f'{x:,}' for x in cells)} | {c.largest:.2g} |", flush=True)
            if concurrency == 1 and rids is not rest and (c.outputs or c.statuses or c.rows):
                wrong.append(f"{what}: served alone, and not the same")
        print(f"\nreplicas, concurrency {concurrency}: {two.manifest['replicas']}\n", file=sys.stderr)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
