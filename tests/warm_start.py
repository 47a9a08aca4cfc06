"""The command line in a process of its own, forked from one that has imported PyTorch and SGLang.

Each start of an engine imports SGLang's seven thousand modules in three processes; the first of them is the command's.
A child that is forked after the imports is as separate as any other process, and spares them. What a command imports,
and how fast, is tested in fresh processes (`tests/test_imports.py`).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PRELOADED = ("torch", "pandas", "pyarrow.parquet", "transformers", "sglang.srt.entrypoints.engine")


class ForkedCli:
    """Runs commands one after another, each in a child of one long-lived process."""

    def __init__(self) -> None:
        self._parent: subprocess.Popen[str] | None = None

    def run(self, args: Sequence[str], env: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run([python, "-m", "sglang_probe", *args], capture_output=True, text=True)` would.

        Raises:
            subprocess.TimeoutExpired: it did not end in time, and was killed.
        """
        if self._parent is None:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._parent = subprocess.Popen([sys.executable, "-m", __name__], **pipes)
        assert self._parent.stdin is not None
        with tempfile.TemporaryDirectory(prefix="forked-cli-") as folder:
            files = [Path(folder) / name for name in ("stdout", "stderr")]
            asked = {
                "args": list(args),
                "env": dict(env),
                "cwd": str(Path.cwd()),
                "files": [str(f) for f in files],
                "timeout": timeout,
            }
            self._parent.stdin.write(json.dumps(asked) + "\n")
            self._parent.stdin.flush()
            code = self._said()
            stdout, stderr = (f.read_bytes().decode(errors="replace") for f in files)
        command = [sys.executable, "-m", "sglang_probe", *args]
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    def _said(self) -> int | None:
        assert self._parent is not None
        assert self._parent.stdout is not None
        line = self._parent.stdout.readline()
        if not line:
            raise RuntimeError("the process that commands are forked from has ended")
        code: int | None = json.loads(line)
        return code

    def close(self) -> None:
        if self._parent is not None:
            assert self._parent.stdin is not None
            assert self._parent.stdout is not None
            self._parent.stdin.close()
            self._parent.stdout.read()  # until it has ended
            self._parent.wait(30)


def _serve() -> None:
    """Fork a child for each line of stdin, and answer with its exit status. A child returns from here."""
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    while line := _read_line():
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(asked)
            return
        sys.stdout.write(json.dumps(_status(child, asked["timeout"])) + "\n")
        sys.stdout.flush()
    os._exit(0)


def _read_line() -> bytes:
    """A line of stdin, read byte by byte: a buffer would be the child's too."""
    line = b""
    while byte := os.read(0, 1):
        line += byte
        if byte == b"\n":
            break
    return line


def _status(child: int, timeout: float) -> int | None:
    """As `Popen.returncode` has it; None for a child that was killed because its time was up."""

    def expire(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        _, status = os.waitpid(child, 0)
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return os.waitstatus_to_exitcode(status)


def _become(asked: dict[str, Any]) -> None:
    """Give this child the files, the folder, the environment and the arguments of a command."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(asked["files"], start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    sys.argv = ["sglang-probe", *asked["args"]]


if __name__ == "__main__":
    if os.fork():  # nobody's child: SGLang ends all children of the process that shuts an engine down
        os._exit(0)
    _serve()
    runpy.run_module("sglang_probe", run_name="__main__", alter_sys=True)
