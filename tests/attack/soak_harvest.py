"""A round of the soak: one harvest that meets kills and faults, and is resumed until it is complete."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sglang_probe.run.run import Run, load_run
from sglang_probe.verify.verify import verify
from sglang_probe.workload.request import asked_rid
from tests.attack.mishaps import ENDED, KILLS, SIGNALS, Mishap, mishaps_of, recorder_of
from tests.attack.outcome import ROOT
from tests.attack.plan import Plan, plan_of
from tests.warm.commands import Started, shared

COMMANDS = 10
"""Commands of a round at most, of which the last ones meet nothing."""
FAULTY = 4
PATIENCE = 600
"""Seconds for a command. What a mishap makes of it, it ends by itself."""
HUNG = 124
"""The exit code that is noted of one that did not."""
VOCABULARY = 3072
"""Of the built-in model."""

Asked = dict[str, Any]


def requests_of(number: int, count: int) -> list[Asked]:
    """Requests that share beginnings: `prompt_ids` and `max_new_tokens`."""
    rng = random.Random(f"requests {number}")
    begins = [[rng.randrange(10, VOCABULARY) for _ in range(rng.randint(5, 160))] for _ in range(rng.randint(1, 8))]
    return [
        {
            "prompt_ids": [*rng.choice(begins), *(rng.randrange(10, VOCABULARY) for _ in range(rng.randint(1, 60)))],
            "max_new_tokens": rng.randint(1, 24),
        }
        for _ in range(count)
    ]


def configuration_of(number: int, count: int) -> tuple[Plan, dict[str, Any]]:
    """The attack's draw, without what the probe refuses and what takes several processes of a model; and its server
    arguments."""
    plan = plan_of(number, count)
    server = {k: v for k, v in plan.server.items() if v not in (None, False)}
    for name in ("tp_size", "dp_size", plan.refused):
        server.pop(name, None)
    return plan, server


def _start(
    arguments: Sequence[str], env: dict[str, str], log: Path, *, forked: bool
) -> subprocess.Popen[bytes] | Started:
    """Start the command, in a session of its own: of a process that has imported SGLang, or of none, for what is read
    while it is imported."""
    if forked:
        return shared().start("sglang_probe", arguments, env, log)
    with open(log, "ab") as out:
        command = [sys.executable, "-m", "sglang_probe", *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
        )


class HarvestRound:
    """One run, from its first command to the one that completes it.

    Args:
        folder: an empty folder of its own.
        shim: the library of `faults.c`.
    """

    def __init__(self, number: int, count: int, folder: Path, shim: Path) -> None:
        self.number, self.folder, self.shim = number, folder, shim
        self.run = folder / "run"
        self.asked = requests_of(number, count)
        self.met: list[tuple[str, str]] = []
        """What came about, and when."""
        self.missed: list[str] = []
        """What was drawn and did not come about: the command had ended before."""
        self.codes: list[int] = []

    def play(self) -> dict[str, Any]:
        """Do it, and say what came of it."""
        plan, config = self._configure()
        mishaps = mishaps_of(self.number, FAULTY)
        while len(self.codes) < COMMANDS and (not self.codes or self.codes[-1] != 0):
            n = len(self.codes)
            self.codes.append(self._command(config, mishaps[n] if n < FAULTY else None, plan.env))
        if self.codes[-1] != 0:
            wrong, told = [f"the run was not completed; exit codes {self.codes}"], {}
        else:
            wrong, told = judge(load_run(self.run), self.asked)
        if HUNG in self.codes:
            wrong = [*wrong, f"a command did not end in {PATIENCE} s and was killed; exit codes {self.codes}"]
        facts = {"met": self.met, "missed": self.missed, "codes": self.codes, "options": plan.options}
        return {"kind": "harvest", **facts, "wrong": wrong, "counts": told}

    def _configure(self) -> tuple[Plan, Path]:
        plan, server = configuration_of(self.number, len(self.asked))
        lines = [
            {"prompt_ids": r["prompt_ids"], "sampling_params": {"max_new_tokens": r["max_new_tokens"]}}
            for r in self.asked
        ]
        workload = self.folder / "requests.jsonl"
        workload.write_text("".join(json.dumps(line) + "\n" for line in lines))
        fields = {
            "workload": {"source": "jsonl", "path": str(workload)},
            "sampling": {"temperature": 1.0},
            "hook_points": plan.hook_points,
            "server": server,
            "arm": {"cache": plan.cache},
            "concurrency": plan.concurrency,
            "order": random.Random(self.number).choice(["as_given", "families"]),
            "checkpoint_seconds": random.Random(self.number).choice([0.2, 1.0, 5.0]),
        }
        config = self.folder / "run.yaml"
        config.write_text(yaml.safe_dump(fields))
        return plan, config

    def _command(self, config: Path, mishap: Mishap | None, env: dict[str, str]) -> int:
        """Run the command, let go wrong what is to, and return its exit code."""
        arguments = ["harvest", str(config), "--output", str(self.run), "--resume"]
        mark, log = self.folder / f"mark-{len(self.codes)}", self.folder / "log.txt"
        environment = os.environ | env | (mishap.environment(self.shim, self.run, mark) if mishap else {})
        process = _start(arguments, environment, log, forked=not env)
        try:
            if mishap and mishap.kind in SIGNALS:
                self._signal(process, mishap)
            return process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return HUNG
        finally:
            if mishap and mishap.kind not in SIGNALS:
                if mark.exists():
                    self.met.append((mishap.kind, "serving"))
                else:
                    self.missed.append(mishap.kind)
            self._wait_for_engines()

    def _signal(self, process: subprocess.Popen[bytes] | Started, mishap: Mishap) -> None:
        """Send it at its moment; not if the command has ended by then."""
        while not mishap.starting and not recorder_of(self.run) and process.poll() is None:
            time.sleep(0.02)
        deadline = time.monotonic() + mishap.wait
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        if process.poll() is not None:
            self.missed.append(mishap.kind)
            return
        engine, kind = recorder_of(self.run), mishap.kind
        if kind == KILLS[0] and not engine:
            kind = KILLS[2]
        self.met.append((kind, "serving" if engine else "starting"))
        if kind == KILLS[0] and engine:
            os.kill(engine, signal.SIGKILL)
        elif kind == KILLS[2]:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.send_signal(signal.SIGTERM if kind == ENDED else signal.SIGKILL)

    def _wait_for_engines(self, seconds: float = 60) -> None:
        """The engines of a command that was killed end by themselves."""
        deadline = time.monotonic() + seconds
        while recorder_of(self.run) and time.monotonic() < deadline:
            time.sleep(0.05)


def judge(run: Run, asked: Sequence[Asked]) -> tuple[list[str], dict[str, int]]:
    """What is wrong with a run that was completed, in words, and what it holds.

    Args:
        asked: what was asked, in the order of the workload.
    """
    wrong = [f"{c.name}: {c.violation}" for c in verify(run) if not c.holds]
    if wrong:
        return wrong, {}
    refused = set(run.manifest.get("refused", {}))
    ended = Counter(map(asked_rid, run.engine_requests()["rid"]))
    if twice := sorted(rid for rid, n in ended.items() if n > 1 and rid not in refused):
        wrong.append(f"{len(twice)} requests ended twice, the first is {twice[0]}")
    if len(ended.keys() | refused) != len(asked):
        wrong.append(f"{len(ended.keys() | refused)} of {len(asked)} requests are there")
    requests = run.requests()
    for r in requests.to_dict("records"):
        due = asked[r["index"]]
        if list(r["prompt_ids"]) != due["prompt_ids"] or r["output_len"] > due["max_new_tokens"]:
            wrong.append(f"{r['rid']} is not what was asked")
            break
    spans = run.spans()
    again = sum("~" in rid for rid in requests["rid"])
    counts = {"positions": int((spans["end"] - spans["start"]).sum()), "rows": run.row_count()}
    return wrong, {"requests": len(asked), **counts, "asked_again": again, "refused": len(refused)}
