"""Several engines on one machine, of which one runs at a time: for ratios that a busy machine does not bend.

Each configuration has an engine in a process of its own. All are started first. While one is measured the others are
stopped (SIGSTOP), because an idle scheduler spins. A round visits the conditions there and back (A B C C B A), so that
a machine that grows slower or faster over the round hits all alike; a ratio is of the sums of both visits. Each visit
begins with an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from stopped import end_with_parent, signal_all

from sglang_probe.paths import shipped

MODEL = shipped("models/probe-text/checkpoint")
STOCK: dict[str, Any] = {"stock": True}
"""In the place of a configuration: SGLang without the plugin."""
ROWS, OUTPUT = 32, 128
"""Concurrent requests, and tokens that each of them decodes."""
CHECKPOINT_SECONDS = 2
"""Shorter than a pass, so that what is timed includes writing to disk."""
WARM = 8
"""Tokens of an output of the pass before each measurement, after the engine was stopped."""
SUFFIX = 3001
"""Token id that ends the prompts of kind `marked`, and is in no other prompt."""


@dataclass(frozen=True)
class Condition:
    """What is measured: an engine, and the prompts that it gets."""

    engine: str
    marked: bool = False
    prompt: int = 16
    """Tokens: so few that what is measured is decoding."""
    output: int = OUTPUT
    passes: int = 1
    """Batches of one measurement."""


class Paired:
    """Engines by name.

    Args:
        probes: the probe's configuration of each, without `run`; None: the plugin is there and has none; `STOCK`: it
            is not there.
        server: arguments of every engine, over ours.
    """

    def __init__(self, probes: Mapping[str, dict[str, Any] | None], server: Mapping[str, Any] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.runs = {name: Path(self._folder.name) / str(i) for i, name in enumerate(probes)}
        self._children: dict[str, subprocess.Popen[str]] = {}
        for name, probe in probes.items():
            self.runs[name].mkdir()
            config = probe if probe is None or probe == STOCK else {**probe, "run": str(self.runs[name])}
            command = [sys.executable, __file__, "--serve", json.dumps([config, dict(server or {})])]
            log = (self.runs[name].with_suffix(".log")).open("w")
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
            self._children[name] = child
        for name in probes:
            self._answer(name)
        for name in probes:
            self._signal(name, signal.SIGSTOP)

    def measure(self, condition: Condition, seed: int) -> dict[str, float]:
        """Seconds of its batches: `wall`, and `cpu` of the scheduler process with all its threads."""
        name = condition.engine
        self._signal(name, signal.SIGCONT)
        try:
            self._ask(name, {})
            asked = {"marked": condition.marked, "prompt": condition.prompt}
            self._ask(name, {**asked, "seed": -seed - 1, "output": min(WARM, condition.output)})
            found = {"wall": 0.0, "cpu": 0.0}
            for i in range(condition.passes):
                batch = self._ask(name, {**asked, "seed": 100 * seed + i, "output": condition.output})
                found = {what: found[what] + batch[what] for what in found}
        finally:
            self._signal(name, signal.SIGSTOP)
        return found

    def close(self) -> None:
        """End the engines; what they recorded stays until `forget`."""
        for name, child in self._children.items():
            self._signal(name, signal.SIGCONT)
            time.sleep(2 * CHECKPOINT_SECONDS)  # what was recorded last becomes durable
            assert child.stdin is not None
            child.stdin.close()
            child.wait(120)

    def forget(self) -> None:
        """Delete what was recorded."""
        self._folder.cleanup()

    def _ask(self, name: str, what: dict[str, Any]) -> dict[str, float]:
        stdin = self._children[name].stdin
        assert stdin is not None
        stdin.write(json.dumps(what) + "\n")
        stdin.flush()
        return self._answer(name)

    def _answer(self, name: str) -> dict[str, float]:
        stdout = self._children[name].stdout
        assert stdout is not None
        for line in stdout:
            if line.startswith("RESULT "):
                return dict(json.loads(line.removeprefix("RESULT ")))
        log = self.runs[name].with_suffix(".log").read_text()
        raise SystemExit(f"the engine `{name}` ended:\n{log[-4000:]}")

    def _signal(self, name: str, number: signal.Signals) -> None:
        signal_all(self._children[name].pid, number)


def rounds_of(
    paired: Paired, conditions: Mapping[str, Condition], count: int, *, seconds: float = float("inf"), seed: int = 0
) -> list[dict[str, dict[str, float]]]:
    """Of each round and condition the sums of `wall` and `cpu` over its two visits; the order is drawn by round.

    Args:
        seconds: after so many no round is begun, once there are three.
    """
    rng, found = random.Random(seed), []
    began = time.perf_counter()
    for n in range(-1, count):  # the first one warms up
        if len(found) >= 3 and time.perf_counter() - began > seconds:
            break
        order = list(conditions)
        rng.shuffle(order)
        sums: dict[str, dict[str, float]] = {name: {"wall": 0.0, "cpu": 0.0} for name in conditions}
        for i, name in enumerate([*order, *reversed(order)]):
            visit = paired.measure(conditions[name], 1000 * (n + 1) + i // len(order))
            for what in sums[name]:
                sums[name][what] += visit[what]
        if n >= 0:
            found.append(sums)
            print(f"round {n + 1}/{count}: " + json.dumps(sums), flush=True)
    return found


def ratios(rounds: Sequence[Mapping[str, Mapping[str, float]]], name: str, base: str, what: str) -> list[float]:
    """Throughput of a condition over that of another, by round."""
    return [r[base][what] / r[name][what] for r in rounds]


def told(values: Sequence[float]) -> str:
    """Median, and the range."""
    return f"**{statistics.median(values):.3f}** ({min(values):.3f} to {max(values):.3f})"


def scheduler_process() -> psutil.Process:
    """The engine's scheduler, by the title that SGLang gives it."""
    children = psutil.Process().children(recursive=True)
    return next(p for p in children if "sglang::scheduler" in " ".join(p.cmdline()))


def prompts_of(seed: int, *, marked: bool, rows: int = ROWS, tokens: int = Condition.prompt) -> list[list[int]]:
    """Random prompts; marked ones end with a token that is in no other."""
    rng = random.Random(f"{seed} {marked}")
    drawn = [[rng.randrange(100, 3000) for _ in range(tokens)] for _ in range(rows)]
    return [[*p[:-6], *[SUFFIX] * 6] for p in drawn] if marked else drawn


def names_of(asked: Mapping[str, Any]) -> list[str]:
    """Request ids, which say whether the prompts are marked."""
    return [f"{'marked' if asked['marked'] else 'plain'} {asked['seed']} {i}" for i in range(ROWS)]


def _serve(probe: dict[str, Any] | None, server: dict[str, Any]) -> None:
    """One engine, asked on stdin."""
    from sglang_probe.engine.hooks.config import EngineProbeConfig
    from sglang_probe.engine.platform.environment import prepare_this_process

    prepare_this_process()
    end_with_parent()
    if probe == STOCK:
        os.environ["SGLANG_PLUGINS"] = "sglang_probe_cpu"
    elif probe is not None:
        config = {"checkpoint_seconds": CHECKPOINT_SECONDS, **probe}
        path = Path(config["run"]) / "probe.yaml"
        path.write_text(EngineProbeConfig.model_validate(config).model_dump_json())
        os.environ["SGLANG_PROBE"] = str(path)
    import sglang

    ours = {
        "model_path": str(MODEL),
        "device": "cpu",
        "attention_backend": "torch_native",
        "max_total_tokens": 32768,
        "max_running_requests": ROWS,
        "log_level": "error",
    }
    engine = sglang.Engine(**{**ours, **server})
    scheduler = scheduler_process()
    print("RESULT {}", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if not asked:
            # What an engine has served before decides which KV slots it hands out, and an engine of two conditions has
            # served more: each visit begins with the same ones.
            engine.flush_cache()
            print("RESULT {}", flush=True)
            continue
        prompts = prompts_of(asked["seed"], marked=asked["marked"], tokens=asked["prompt"])
        params = {"max_new_tokens": asked["output"], "temperature": 0.0, "ignore_eos": True}
        began, cpu = time.perf_counter(), sum(scheduler.cpu_times()[:2])
        engine.generate(input_ids=prompts, sampling_params=params, rid=names_of(asked))
        wall, cpu = time.perf_counter() - began, sum(scheduler.cpu_times()[:2]) - cpu
        print("RESULT " + json.dumps({"wall": wall, "cpu": cpu}), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", required=True, help=argparse.SUPPRESS)
    _serve(*json.loads(parser.parse_args().serve))
