"""The case in production: real servers, the clamp and its gate of intent, and what it costs who is out of scope.

One server without the clamp serves the test requests twice, another with it once; each time one request after the
other, and then sixteen at a time. The two plain runs are the floor.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from dialogues import Dialogue
from traffic import SAMPLING, number, replies, requests

from sglang_probe.run.run import Run, load_run
from sglang_probe.run.schema import REUSED
from sglang_probe.stats.distance import row_distance
from sglang_probe.workload.request import Request

KEY = "clamp-case"
AT_A_TIME = {"alone": 1, "together": 16}
PLAIN, AGAIN, CLAMPED = "plain", "again", "clamped"
STARTS_WITHIN = 400.0


class Server:
    """`python -m sglang.launch_server` with the probe, on 127.0.0.1."""

    def __init__(self, folder: Path, model: Path, probe: dict[str, Any]) -> None:
        self.folder = folder = folder.resolve()
        folder.mkdir(parents=True)
        config = folder / "probe.yaml"
        told = {"run": str(folder / "run"), "live": {"privacy": "ids"}, "checkpoint_seconds": 2.0, **probe}
        config.write_text(yaml.safe_dump(told))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [
            sys.executable,
            "-m",
            "sglang.launch_server",
            "--model-path",
            str(model.resolve()),
            "--dtype",
            "float32",
        ]
        command += ["--host", "127.0.0.1", "--port", str(port), "--max-total-tokens", "8192", "--api-key", KEY]
        command += ["--log-level", "warning"]
        env = {**os.environ, "SGLANG_PROBE": str(config), "OMP_NUM_THREADS": "1"}
        with open(folder / "server.log", "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, start_new_session=True
            )
        self._ready()

    def _ready(self) -> None:
        until = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < until and self.process.poll() is None:
            with (
                contextlib.suppress(OSError, urllib.error.URLError),
                urllib.request.urlopen(self.url + "/health", timeout=2),
            ):
                return
            time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"the server did not start: {(self.folder / 'server.log').read_text()[-2000:]}")

    def ask(self, path: str, body: dict[str, Any] | None = None, *, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read())

    def serve(self, name: str, drawn: Sequence[Dialogue], at_a_time: int) -> dict[str, Any]:
        """Serve them; the path of their segment, and in their order the log-probabilities of each reply."""
        self.ask("/probe/flush?cache=true&timeout=30", method="POST")

        def one(r: Request) -> Any:
            body = {"rid": r.rid, "input_ids": list(r.prompt_ids), "sampling_params": SAMPLING, "return_logprob": True}
            return self.ask("/generate", body)["meta_info"]["output_token_logprobs"]

        with ThreadPoolExecutor(at_a_time) as pool:
            logprobs = list(pool.map(one, requests(drawn, name=name)))
        return {"segment": self.ask("/probe/flush", method="POST")["segment"], "logprobs": logprobs}

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def server(folder: Path, model: Path, probe: dict[str, Any]) -> Iterator[Server]:
    found = Server(folder, model, probe)
    try:
        yield found
    finally:
        found.stop()


def served(
    folder: Path, model: Path, hook_points: list[str], clamp: dict[str, Any], tests: Sequence[Dialogue]
) -> dict[str, Any]:
    """Serve the tests by both servers; by name and way of serving, the segment and the log-probabilities.

    Args:
        clamp: `steer` of the second server's configuration.
    """
    done = folder / "served.json"
    if not done.exists():
        found: dict[str, Any] = {}
        probe = {"hook_points": hook_points}
        for name, more, runs in (("before", {}, (PLAIN, AGAIN)), ("after", {"steer": clamp}, (CLAMPED,))):
            kept = folder / f"{name}.json"
            if not kept.exists():
                if (folder / name).exists():  # of a start that was cut short
                    (folder / name).rename(folder / f"{name}.{time.time_ns()}")
                with server(folder / name, model, {**probe, **more}) as one:
                    mine = {
                        f"{run} {way}": one.serve(f"{run} {way}", tests, n)
                        for way, n in AT_A_TIME.items()
                        for run in runs
                    }
                    mine["status"] = one.ask("/probe/status")
                kept.write_text(json.dumps(mine))
            found |= {k if k != "status" else f"status {name}": v for k, v in json.loads(kept.read_text()).items()}
        done.write_text(json.dumps(found))
    return dict(json.loads(done.read_text()))


def collateral(told: dict[str, Any], way: str, points: Sequence[str]) -> dict[str, Any]:
    """Of requests that the gate left out of scope: what differs between the plain run and the clamped one, beside what
    differs between two plain runs of the same requests.

    A request whose gate opens publishes nothing, so that another may find less of its prompt in the prefix cache than
    without the clamp; what is computed in one piece or in two is rounded differently. So requests that reused equally
    much in both runs are counted apart from the others.
    """
    runs = {name: load_run(told[f"{name} {way}"]["segment"]) for name in (PLAIN, AGAIN, CLAMPED)}
    gates = runs[CLAMPED].gates()
    closed = [number(rid) for rid, opened in zip(gates["rid"], gates["opened"], strict=True) if not opened]
    return {
        "left_out": len(closed),
        "clamped": _differences(told, way, runs, CLAMPED, closed, points),
        "floor": _differences(told, way, runs, AGAIN, closed, points),
    }


def _differences(
    told: dict[str, Any], way: str, runs: dict[str, Run], other: str, of: Sequence[int], points: Sequence[str]
) -> dict[str, Any]:
    """Requests of whose outputs, log-probabilities or rows any bit is another than in the plain run, by whether they
    reused as many positions in both."""
    outputs = {name: replies(runs[name]) for name in (PLAIN, other)}
    logprobs = {name: told[f"{name} {way}"]["logprobs"] for name in (PLAIN, other)}
    reused = {name: _reused(runs[name]) for name in (PLAIN, other)}
    none = {"requests": 0, "outputs": 0, "logprobs": 0, "rows": 0, "rows_compared": 0, "largest": 0.0}
    found: dict[str, dict[str, Any]] = {"equal reuse": dict(none), "other reuse": dict(none)}
    for i in of:
        mine = found["equal reuse" if reused[PLAIN].get(i) == reused[other].get(i) else "other reuse"]
        mine["requests"] += 1
        mine["outputs"] += outputs[PLAIN][i] != outputs[other][i]
        mine["logprobs"] += logprobs[PLAIN][i] != logprobs[other][i]
        alike = True
        for point in points:
            x, y = (runs[name].activations(f"{name} {way}:{i}", point, intervened=True) for name in (PLAIN, other))
            mine["rows_compared"] += len(x)
            if x.shape != y.shape:
                alike = False
            elif not torch.equal(x, y):
                alike = False
                mine["largest"] = max(mine["largest"], float(row_distance(x, y)[0].max()))
        mine["rows"] += not alike
    return found


def _reused(run: Run) -> dict[int, int]:
    """Positions that each request took from the prefix cache."""
    spans = run.spans()
    spans = spans[spans["status"] == REUSED]
    lengths = (spans["end"] - spans["start"]).groupby(spans["rid"]).sum()
    return {number(rid): int(n) for rid, n in lengths.items()}
