"""Harvests that meet kills and faults, and are finished: `python -m tests.attack.soak --out DIR --hours H`.

Each round draws a configuration of the engine, requests that share prefixes, and what goes wrong, all from its number:
an engine, the command or everything gets SIGKILL at a random moment, or the command SIGTERM; the disk is full, fails
with EIO, or is slow; the wall clock jumps (`faults.c`, compiled here). Then the command is given with `--resume` until
the run is complete, and the run must hold every invariant of `sglang-probe verify` and every request once.

A finished round leaves `DIR/round-N.json` and is not done again, so that a soak can be interrupted and extended. The
run directory of a round stays only if something is wrong. Exit code 1 if anything is.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from sglang_probe.run.run import load_run
from sglang_probe.verify.verify import verify
from sglang_probe.workload.request import asked_rid
from tests.attack.outcome import ROOT
from tests.attack.plan import plan_of

KILLS = ("engine killed", "command killed", "all killed", "command ended")
FAULTS = (*KILLS, "disk full", "disk broken", "disk slow", "clock forward", "clock back")
TRIES = 8
"""Commands of a round, of which the last ones meet no fault."""
FAULTY = 4
"""Commands of a round that may meet a fault."""
WORDS = [f"{a}{b}" for a in ("al", "be", "ga", "de") for b in ("pha", "ta", "mma", "lta")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hours", type=float, default=1.0, help="no round begins later")
    parser.add_argument("--requests", type=int, default=60, help="requests a round")
    parser.add_argument("--first", type=int, default=1, help="number of the first round")
    parser.add_argument("--document", type=Path, help="a Markdown file whose part after `## The run` is written anew")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    shim = args.out / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(shim), str(source), "-ldl"], check=True)
    until = time.monotonic() + 3600 * args.hours
    number = args.first
    while time.monotonic() < until:
        path = args.out / f"round-{number}.json"
        if not path.exists():
            record = Round(number, args.requests, args.out, shim).play()
            path.write_text(json.dumps(record, indent=1) + "\n")
            said = "; ".join(record["wrong"]) or f"{record['positions']:,} positions, all as they must be"
            what = ", ".join(f"{fault} at {when}" for fault, when in record["faults"]) or "nothing"
            print(f"round {number}, {record['seconds']:.0f} s: {what}: {said}", flush=True)
        number += 1
    records = sorted((json.loads(p.read_text()) for p in args.out.glob("round-*.json")), key=lambda r: r["round"])
    print(page(records))
    if args.document:
        above, heading, _ = args.document.read_text().partition("## The run\n")
        args.document.write_text(f"{above}{heading}\n{page(records)}\n")
    return 1 if any(r["wrong"] for r in records) else 0


class Round:
    """One run, from its first command to the one that completes it."""

    def __init__(self, number: int, requests: int, out: Path, shim: Path) -> None:
        self.number, self.requests, self.shim = number, requests, shim
        self.folder = out / f"round-{number}"
        self.run = self.folder / "run"
        self.rng = random.Random(number)
        self.faults: list[tuple[str, str]] = []
        """What went wrong, and when: `starting`, `serving`, or the seconds since the command began to serve."""
        self.codes: list[int] = []

    def play(self) -> dict[str, Any]:
        """Do it, and say what came of it."""
        began = time.monotonic()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        options, config = self._configure()
        while len(self.codes) < TRIES and (not self.codes or self.codes[-1] != 0):
            fault = self.rng.choice(FAULTS) if len(self.codes) < FAULTY else None
            self.codes.append(self._command(config, fault))
        wrong, told = self._judge()
        if not wrong:
            shutil.rmtree(self.folder)
        facts = {"faults": self.faults, "codes": self.codes, "options": options, "wrong": wrong, **told}
        return {"round": self.number, "seconds": round(time.monotonic() - began, 1), **facts}

    def _configure(self) -> tuple[dict[str, Any], Path]:
        rng, plan = self.rng, plan_of(self.number, self.requests)
        server = {k: v for k, v in plan.server.items() if v is not None and k not in ("tp_size", plan.refused)}
        begins = [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(rng.randint(1, 6))]
        lines = []
        for _ in range(self.requests):
            text = f"{rng.choice(begins)} {' '.join(rng.choices(WORDS, k=rng.randint(1, 30)))}"
            lines.append({"prompt": text, "sampling_params": {"max_new_tokens": rng.randint(1, 24)}})
        (self.folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        fields = {
            "workload": {"source": "jsonl", "path": str(self.folder / "requests.jsonl")},
            "sampling": {"temperature": 1.0},
            "hook_points": plan.hook_points,
            "server": server,
            "arm": {"cache": plan.cache},
            "concurrency": plan.concurrency,
            "checkpoint_seconds": rng.choice([0.2, 1.0, 5.0]),
        }
        config = self.folder / "run.yaml"
        config.write_text(yaml.safe_dump(fields))
        return plan.options, config

    def _command(self, config: Path, fault: str | None) -> int:
        """Run the command, do what is to go wrong, and return its exit code."""
        command = [sys.executable, "-m", "sglang_probe", "harvest", str(config), "--output", str(self.run), "--resume"]
        env = os.environ | self._environment(fault)
        with open(self.folder / "log.txt", "ab") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        if fault in KILLS:
            self._kill(process, fault)
        elif fault is not None:
            self.faults.append((fault, "serving"))
        try:
            return process.wait(timeout=600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()
        finally:
            if fault == "command killed":
                self._engines_end()

    def _environment(self, fault: str | None) -> dict[str, str]:
        rng, env = self.rng, {"SOAK_DIR": str(self.run)}
        if fault in ("disk full", "disk broken"):
            number = errno.ENOSPC if fault == "disk full" else errno.EIO
            env |= {"SOAK_ERRNO": str(number), "SOAK_AFTER": str(rng.choice([3_000, 50_000, 400_000, 3_000_000]))}
        elif fault == "disk slow":
            env["SOAK_SLOW_US"] = str(rng.choice([20_000, 200_000]))
        elif fault in ("clock forward", "clock back"):
            jump = rng.choice([2, 60, 86_400]) * (1 if fault == "clock forward" else -1)
            env |= {"SOAK_JUMP": str(jump), "SOAK_JUMP_AFTER": str(rng.randint(5, 25))}
        else:
            return {}
        return {**env, "LD_PRELOAD": str(self.shim)}

    def _kill(self, process: subprocess.Popen[bytes], fault: str) -> None:
        """At a random moment, of starting or of serving; nothing if the command has ended by then."""
        starting = self.rng.random() < 0.2
        wait = self.rng.uniform(0, 8) if starting else self.rng.expovariate(1 / 1.5)
        while not starting and not (engine := self._engine()) and process.poll() is None:
            time.sleep(0.02)
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            return
        when = "starting" if starting else f"{wait:.1f} s"
        engine = self._engine()
        if fault == "engine killed" and not engine:
            fault = "all killed"
        self.faults.append((fault, when))
        if fault == "engine killed" and engine:
            os.kill(engine, signal.SIGKILL)
        elif fault == "all killed":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.send_signal(signal.SIGKILL if fault == "command killed" else signal.SIGTERM)

    def _engine(self) -> int | None:
        """Process id of an engine that writes the run."""
        for lock in sorted(self.run.glob(".lock*")):
            try:
                if found := re.match(r"process (\d+)", lock.read_text()):
                    os.kill(int(found[1]), 0)
                    return int(found[1])
            except (OSError, UnicodeDecodeError):
                continue
        return None

    def _engines_end(self, seconds: float = 60) -> None:
        """Wait for the engines of a command that was killed: they end with it."""
        deadline = time.monotonic() + seconds
        while self._engine() and time.monotonic() < deadline:
            time.sleep(0.05)

    def _judge(self) -> tuple[list[str], dict[str, int]]:
        told = {"positions": 0, "rows": 0, "asked_again": 0, "refused": 0, "requests": 0}
        if self.codes[-1] != 0:
            return [f"exit codes {self.codes}: the run was not completed"], told
        run = load_run(self.run)
        wrong = [f"{c.name}: {c.violation}" for c in verify(run) if not c.holds]
        ended = Counter(map(asked_rid, run.engine_requests()["rid"])) + Counter(run.manifest["refused"].keys())
        if twice := [rid for rid, n in ended.items() if n > 1 and rid not in run.manifest["refused"]]:
            wrong.append(f"{twice[0]} is there twice")
        if len(ended) != self.requests:
            wrong.append(f"{len(ended)} of {self.requests} requests are there")
        spans = run.spans()
        again = sum("~" in rid for rid in run.requests()["rid"])
        told |= {"positions": int((spans["end"] - spans["start"]).sum()), "rows": run.row_count()}
        return wrong, told | {"asked_again": again, "refused": len(run.manifest["refused"]), "requests": len(ended)}


def page(records: list[dict[str, Any]]) -> str:
    """What all rounds came to, in Markdown."""
    met = Counter(fault for r in records for fault, _ in r["faults"])
    kills = sum(met[kind] for kind in KILLS[:3])
    requests, wrong = sum(r["requests"] for r in records), [r for r in records if r["wrong"]]
    lines = [
        f"{len(records)} rounds in {sum(r['seconds'] for r in records) / 60:.0f} minutes: {requests:,} requests "
        f"({sum(r['asked_again'] for r in records):,} asked again after an engine ended, "
        f"{sum(r['refused'] for r in records):,} refused by SGLang), "
        f"{sum(r['positions'] for r in records):,} positions, {sum(r['rows'] for r in records):,} rows; "
        f"{kills} SIGKILLs. Rounds in which something was wrong: {len(wrong)}.",
        "",
        "The aim is a million requests and a thousand kills: "
        f"this is {requests / 1e6:.3%} and {kills / 1e3:.1%} of it.",
        "",
        "| what went wrong | times |",
        "|---|---|",
        *(f"| {fault} | {met[fault]} |" for fault in FAULTS),
    ]
    lines += ["", *(f"* round {r['round']}: {'; '.join(r['wrong'])}" for r in wrong)]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    sys.exit(main())
