"""Commands and servers in processes of their own, forked from one that has imported PyTorch and SGLang.

A child that is forked after the imports is as separate as any other process, and spares them. What a command imports,
and how fast, is tested in fresh processes (`tests/test_imports.py`).
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.warm.children import IMPORTED, fork_server


class Started:
    """A command that runs in a session of its own: what tests use of `subprocess.Popen`.

    Attributes:
        pid: of the process, which leads its session.
        returncode: as `Popen.returncode`; None while it runs.
    """

    def __init__(self, command: Sequence[str], pid: int, ended: Path) -> None:
        self.args, self.pid, self._ended = list(command), pid, ended
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self._ended.exists():
            self.returncode = int(self._ended.read_text())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status.

        Raises:
            subprocess.TimeoutExpired: it did not end in time; it goes on.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class WarmStart:
    """Runs commands one after another, and starts others beside them, each in a child of one long-lived process."""

    def __init__(self) -> None:
        self._parent: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="warm-start-")
        self._count = 0

    def run(self, args: Sequence[str], env: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run([python, "-m", "sglang_probe", *args], capture_output=True, text=True)` would.

        Raises:
            subprocess.TimeoutExpired: it did not end in time, and was killed.
        """
        files = [self._file() for _ in range(2)]
        code = self._ask("sglang_probe", args, env, files, timeout=timeout)
        stdout, stderr = (f.read_bytes().decode(errors="replace") for f in files)
        command = [sys.executable, "-m", "sglang_probe", *args]
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    def start(self, module: str, args: Sequence[str], env: Mapping[str, str], log: Path | None = None) -> Started:
        """As `subprocess.Popen([python, "-m", module, *args], start_new_session=True)` would; both its outputs are
        written to one file."""
        ended = self._file()
        files = [log or Path(os.devnull)] * 2
        pid = self._ask(module, args, env, files, ended=str(ended))
        assert pid is not None
        return Started([sys.executable, "-m", module, *args], pid, ended)

    def _file(self) -> Path:
        self._count += 1
        return Path(self._folder.name) / str(self._count)

    def _ask(
        self, module: str, args: Sequence[str], env: Mapping[str, str], files: Sequence[Path], **how: Any
    ) -> int | None:
        """Exit status of a command, or the process number of one whose end is awaited by nobody."""
        if self._parent is None:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._parent = subprocess.Popen([sys.executable, "-m", __name__], **pipes)
        assert self._parent.stdin is not None
        asked = {"module": module, "args": list(args), "env": dict(env), "cwd": str(Path.cwd()), **how}
        self._parent.stdin.write(json.dumps({**asked, "files": [str(f) for f in files]}) + "\n")
        self._parent.stdin.flush()
        return self._said()

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
        self._folder.cleanup()


@functools.cache
def shared() -> WarmStart:
    """The one of this test session."""
    return WarmStart()


def _serve() -> str:
    """Fork a child for each line of stdin, and answer with its exit status, or at once with its process number. A
    child returns from here, with the name of the module that it runs."""
    for name in IMPORTED:
        with contextlib.suppress(ImportError):  # what another release does not have
            importlib.import_module(name)
    importlib.import_module(
        "setproctitle"
    ).getproctitle()  # finds the place of the title while the environment is still where it was
    gc.freeze()
    while line := _read_line():
        asked = json.loads(line)
        alone = "ended" in asked
        child = _fork_and_watch(asked["ended"]) if alone else os.fork()
        if child == 0:
            _become(asked)
            return str(asked["module"])
        sys.stdout.write(json.dumps(child if alone else _status(child, asked["timeout"])) + "\n")
        sys.stdout.flush()
    os._exit(0)


def _fork_and_watch(ended: str) -> int:
    """A child that leads a session, below one that waits for its end and writes down how it was. 0 in the child."""
    read, write = os.pipe()
    watching = os.fork()
    if watching:
        os.close(write)
        os.waitpid(watching, 0)
        with open(read) as said:
            return int(said.readline())
    if os.fork():  # nobody's child, so that nobody has to wait for it
        os._exit(0)
    os.close(read)
    child = os.fork()
    if child == 0:
        os.close(write)
        os.setsid()
        return 0
    for number in (0, 1):  # the pipes of commands are not held open by one that waits
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    os.write(write, f"{child}\n".encode())
    os.close(write)
    _, status = os.waitpid(child, 0)
    Path(f"{ended}.part").write_text(str(os.waitstatus_to_exitcode(status)))
    Path(f"{ended}.part").replace(ended)
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
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    fork_server()
    sys.argv = [asked["module"], *asked["args"]]


if __name__ == "__main__":
    if os.fork():  # nobody's child: SGLang ends all children of the process that shuts an engine down
        os._exit(0)
    runpy.run_module(_serve(), run_name="__main__", alter_sys=True)
