"""A server for the gate: one that runs, or one that is started for it from a YAML, stock and without the plugin."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from sglang_probe.config import Config, load_config
from sglang_probe.errors import ConfigError, ProbeError

_TAIL = 3000


class ServerConfig(Config):
    """A stock server that is started for the gate, and ended after it. Needs SGLang here."""

    model: str = Field(description="A name of `sglang-probe model list`, a folder, or a hub id.")
    server: dict[str, Any] = Field(default={}, description="SGLang server arguments, e.g. `{page_size: 16}`.")
    dtype: str = Field(default="auto", description="`bfloat16`, `float16`, `float32`; `auto`: the checkpoint's.")
    start_seconds: float = Field(default=600, gt=0, description="Seconds that it may take to start.")


@contextlib.contextmanager
def served(named: str, tell: Callable[[str], object], folder: Callable[[str], str]) -> Iterator[str]:
    """The address of the server that is named.

    Args:
        named: an address, or the path of a YAML (`ServerConfig`).
        folder: the folder of a model that is named.

    Raises:
        ConfigError: it is neither.
        ProbeError: the server did not start.
    """
    if "://" in named:
        yield named
        return
    if not Path(named).is_file():
        raise ConfigError(
            f"`{named}` is neither an address nor a file", fix="give http://127.0.0.1:30000, or a YAML with `model:`"
        )
    config = load_config(Path(named), ServerConfig)
    tell(f"starting a server for {config.model}")
    with tempfile.TemporaryFile() as log:
        url = f"http://127.0.0.1:{(port := _free_port())}"
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang.launch_server", *_arguments(config, folder(config.model), port)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={k: v for k, v in os.environ.items() if k != "SGLANG_PROBE"},
            start_new_session=True,
        )
        try:
            _wait(process, url, config.start_seconds, log)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


def _arguments(config: ServerConfig, model: str, port: int) -> list[str]:
    found = ["--model-path", model, "--host", "127.0.0.1", "--port", str(port)]
    found += ["--dtype", config.dtype, "--log-level", "warning"]
    for name, value in config.server.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            found.append(flag)
        elif value is not False and value is not None:
            found += [flag, *(map(str, value) if isinstance(value, list) else [str(value)])]
    return found


def _wait(process: subprocess.Popen[bytes], url: str, seconds: float, log: Any) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError):
            pass
        time.sleep(0.5)
    log.seek(0)
    said = log.read()[-_TAIL:].decode("utf-8", "replace").strip()
    why = "ended while it started" if process.poll() is not None else f"did not start within {seconds:.0f} s"
    raise ProbeError(f"the server {why}; its last words:\n{said}", fix="start it by hand, and give its address")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
