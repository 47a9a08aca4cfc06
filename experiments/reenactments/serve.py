"""Real servers on 127.0.0.1: stock SGLang with the probe, recording token ids."""

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
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sglang_probe.paths import shipped

ROOT = Path(__file__).parents[2]
MODEL = shipped("models/probe-text/checkpoint")
STARTS_WITHIN = 400.0
NEW = 16
"""Tokens that are generated for each request."""


class Server:
    """`python -m sglang.launch_server` with the probe.

    Args:
        folder: of its recording and its log.
        arguments: of SGLang, beside model and address.
        planted: a file; while it says so, the server reuses wrongly (`tests/gate/plugin/planted.py`).
    """

    def __init__(self, folder: Path, *arguments: str, planted: Path | None = None) -> None:
        self.run = (folder := folder.resolve()) / f"run-{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True, exist_ok=True)
        live = {"privacy": "ids", "segments": {"min_seconds": 0.0}}
        config = folder / "probe.yaml"
        config.write_text(yaml.safe_dump({"run": str(self.run), "live": live, "checkpoint_seconds": 2.0}))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(MODEL), "--dtype", "float32"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning", *arguments]
        env = {**os.environ, "SGLANG_PROBE": str(config), "OMP_NUM_THREADS": "1"}
        if planted is not None:
            search = [str(ROOT / "tests" / "gate" / "plugin"), *filter(None, [os.environ.get("PYTHONPATH")])]
            env |= {"PLANTED_WRONG_SLOTS": str(planted.resolve()), "PYTHONPATH": os.pathsep.join(search)}
        self.log = folder / "server.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, start_new_session=True
            )

    def __enter__(self) -> Server:
        until = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < until and self.process.poll() is None:
            with (
                contextlib.suppress(OSError, urllib.error.URLError),
                urllib.request.urlopen(self.url + "/health", timeout=2),
            ):
                return self
            time.sleep(0.5)
        self.__exit__()
        raise RuntimeError(f"the server did not start: {self.log.read_text()[-2000:]}")

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """One POST, and its answer."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body or {}).encode(), headers, method="POST")
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.loads(answer.read())

    def generate(self, ids: Sequence[int], *, session: str, salt: str | None = None) -> list[int]:
        """Token ids of a greedy answer of `NEW` tokens."""
        params = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}
        params["custom_params"] = {"probe": {"labels": {"session": session}}}
        body = {"input_ids": list(ids), "sampling_params": params, **({} if salt is None else {"cache_salt": salt})}
        return [int(i) for i in self.ask("/generate", body)["output_ids"]]

    def empty(self) -> None:
        """Nothing is cached, and a new segment begins."""
        self.ask("/probe/flush?cache=true&timeout=30")

    def close_segment(self) -> Path:
        """The folder of what was recorded since `empty`."""
        return Path(self.ask("/probe/flush")["segment"])
