"""One real server with the probe attached, as a user starts it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from sglang_probe.paths import shipped
from tests.warm.commands import Started, shared

MODEL = shipped("models/probe-text/checkpoint")
KEY, ADMIN_KEY = "secret", "admin-secret"


class LiveServer:
    """`SGLANG_PROBE=probe.yaml python -m sglang.launch_server ...` on the CPU, bound to 127.0.0.1.

    Args:
        environment: variables that may be read while SGLang is imported: the server starts anew, which takes longer.
        read_late: variables that are not.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        environment: dict[str, str] | None = None,
        read_late: dict[str, str] | None = None,
        probe: dict[str, Any] | None = None,
        **live: Any,
    ) -> None:
        self.run = folder / "run"
        self.log = folder / "server.log"
        config = folder / "probe.yaml"
        config.write_text(
            yaml.safe_dump({"run": str(self.run), "live": live, "checkpoint_seconds": 2.0, **(probe or {})})
        )
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = ["--model-path", str(MODEL), "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--enable-metrics", "--api-key", KEY, "--log-level", "warning"]
        # A server of a session fixture waits for most of the suite: it would poll with a whole core meanwhile.
        command += ["--sleep-on-idle"]
        if "--max-total-tokens" not in arguments:
            command += ["--max-total-tokens", "65536"]
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        env |= {"SGLANG_PROBE": str(config), "OMP_NUM_THREADS": "1", **(read_late or {}), **(environment or {})}
        self.process: subprocess.Popen[bytes] | Started
        if environment:  # read while SGLang is imported, for all we know
            with open(self.log, "w") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "sglang.launch_server", *command, *arguments],
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    env=env,
                    start_new_session=True,
                )
        else:
            self.process = shared().start("sglang.launch_server", [*command, *arguments], env, self.log)
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        admin_key = ADMIN_KEY if "--admin-api-key" in arguments else KEY
        self.admin = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {admin_key}"}, timeout=60)
        self.anybody = httpx.Client(base_url=self.url, timeout=60)

    def wait_until_ready(self, timeout: float = 180) -> None:
        deadline = time.time() + timeout
        while time.time() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if self.anybody.get("/health", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"the server did not start: {self.log.read_text()[-4000:]}")

    def generate(self, prompt: list[int], n: int = 8, **fields: Any) -> dict[str, Any]:
        """One request to SGLang's own `/generate`, by token ids."""
        params = {"max_new_tokens": n, "temperature": 0.0, "ignore_eos": True, **fields.pop("sampling_params", {})}
        answer = self.http.post("/generate", json={"input_ids": prompt, "sampling_params": params, **fields})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    @contextlib.contextmanager
    def running(self, prompt: list[int], n: int, **fields: Any) -> Iterator[dict[str, Any]]:
        """A request that has its first token when the block begins, however fast the machine is, and ends with it.

        What is yielded is filled with the last answer of the stream when the block ends.
        """
        params = {"max_new_tokens": n, "temperature": 0.0, "ignore_eos": True, **fields.pop("sampling_params", {})}
        body = {"input_ids": prompt, "sampling_params": params, "stream": True, **fields}
        with (
            httpx.Client(base_url=self.url, headers=self.http.headers, timeout=60) as client,
            client.stream("POST", "/generate", json=body) as answer,
        ):
            assert answer.status_code == 200, answer.read()
            lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
            told = json.loads(next(lines).removeprefix("data: "))
            yield told
            for line in lines:
                told.update(json.loads(line.removeprefix("data: ")))

    def status(self) -> dict[str, Any]:
        return dict(self.http.get("/probe/status").json())

    def flush(self) -> Path:
        """Close the segment; its path."""
        answer = self.admin.post("/probe/flush")
        assert answer.status_code == 200, answer.text
        return Path(answer.json()["segment"])

    def terminate(self, timeout: float = 60) -> int:
        """SIGTERM, as a process manager does it."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        """End what may be left of the server, which is a session of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
