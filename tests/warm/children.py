"""The processes of an engine, forked from one that has imported SGLang.

SGLang starts its scheduler and its detokenizer by multiprocessing's method `spawn`: a new interpreter that imports some
seven thousand modules before it does anything, ten seconds of computing each time. Here the new process is a child of
Python's own fork server, which has imported them and done nothing else. What it is given is the same (pickled target
and arguments, environment, signal handlers), it is a descendant of the process that asked for it, and it ends with it.

Only tests do this. Those of a fresh start (`tests/end_to_end/test_inert.py`, commands with an environment of their
own) do not.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
from multiprocessing import connection, context, forkserver, popen_forkserver, popen_spawn_posix, spawn
from types import FrameType
from typing import Any

IMPORTED = (
    "pandas",
    "pyarrow.parquet",
    "fastapi",
    "flashinfer",
    "torch._inductor.compile_fx",
    "transformers.generation.continuous_batching",
    "sglang.srt.server_args",
    "sglang.srt.managers.schedule_batch",
    "sglang.srt.layers.quantization",
)
"""Nearly all that SGLang imports, and none of the modules by which the plugin tells what a process is for
(`engine/hooks/install.py`): each imports its own, as it would."""

_FIRST = ["tests.warm.preloaded", *IMPORTED]

_POSSIBLE = sys.version_info < (3, 14)
"""Later fork servers ask their clients for a key, which `fork_server` below does not hand on."""

_ENVIRONMENT = "environment_of_the_caller"
_PR_SET_PDEATHSIG = 1


def install() -> None:
    """Let `spawn` in this process mean a fork from a fork server that has imported SGLang; it starts when asked."""
    if _POSSIBLE:
        _patch()
        forkserver.set_forkserver_preload(_FIRST)


def fork_server() -> None:
    """As `install`, in a process with one thread that has imported SGLang: the fork server is forked from it now."""
    if not _POSSIBLE:
        return
    _patch()
    forkserver.set_forkserver_preload(_FIRST)  # should it end, another is started
    listener = socket.socket(socket.AF_UNIX)
    address = connection.arbitrary_address("AF_UNIX")
    listener.bind(address)
    listener.listen()
    alive_r, alive_w = os.pipe()
    parent = os.getpid()
    server = os.fork()
    if server == 0:
        os.close(alive_w)
        become_the_server(parent)
        with contextlib.suppress(SystemExit):
            forkserver.main(listener.detach(), alive_r, [])
        os._exit(0)
    listener.close()
    os.close(alive_r)
    running: Any = forkserver._forkserver  # type: ignore[attr-defined]
    running._forkserver_address = address
    running._forkserver_alive_fd = alive_w
    running._forkserver_pid = server


def _patch() -> None:
    spawn.prepare = _prepare
    spawn.get_preparation_data = _preparation_data
    context.SpawnProcess._Popen = staticmethod(_start)  # type: ignore[method-assign, assignment]


_original_prepare, _original_data = spawn.prepare, spawn.get_preparation_data


def _start(process: Any) -> Any:
    """A process of method `spawn`. Those that were not imported beforehand gain nothing and start as they would."""
    target = getattr(process._target, "__module__", "")
    way = popen_forkserver if target.startswith("sglang.") else popen_spawn_posix
    return way.Popen(process)


def _preparation_data(name: str) -> dict[str, Any]:
    return {**_original_data(name), _ENVIRONMENT: dict(os.environ)}


def _prepare(data: dict[str, Any]) -> None:
    """In the new process: what a new interpreter would have, the caller's environment and no handlers of the server."""
    environment = data.pop(_ENVIRONMENT)
    os.environ.clear()
    os.environ.update(environment)
    for number in (signal.SIGQUIT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    _original_prepare(data)


def become_the_server(parent: int | None = None) -> None:
    """In the fork server: hand on to the parent what SGLang's scheduler tells its parent by a signal, and end with it,
    so that the engine's processes do.

    Args:
        parent: who forked this process from its main thread, if it was not started as a program.
    """
    asking = parent or os.getppid()

    def hand_on(number: int, _: FrameType | None) -> None:
        os.kill(asking, number)

    def end_with_it(*_: Any) -> None:
        if os.getppid() != asking:
            os._exit(0)

    _patch()
    signal.signal(signal.SIGQUIT, hand_on)
    if parent is None:  # the kernel would tell of the end of a thread, and any thread may have asked for this server
        signal.signal(signal.SIGALRM, end_with_it)
        signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)
    else:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        end_with_it()
