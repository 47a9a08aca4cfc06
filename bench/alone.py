"""A command in a process of its own, and what it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

# Linux begins the count of a process' largest resident set with what its parent held when it was made, also after
# `posix_spawn`. So the command is not started by a benchmark that has imported PyTorch, but by a Python without it.
_LAUNCHER = """
import json, os, sys, time
began = time.perf_counter()
quiet = [(os.POSIX_SPAWN_DUP2, os.open(os.devnull, os.O_WRONLY), 1)]
_, status, used = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet), 0)
found = [time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 2**10]
print(json.dumps([os.waitstatus_to_exitcode(status), *found]))
"""


@dataclass(frozen=True)
class Spent:
    """By the command; not by the processes that it starts and does not wait for."""

    seconds: float
    cpu_seconds: float
    peak_mib: float
    """Largest resident set, mapped pages of files included."""


def run_alone(command: Sequence[str]) -> Spent:
    """Run a command; what it prints is dropped.

    Args:
        command: the path of the program first.

    Raises:
        SystemExit: it failed.
    """
    launched = [sys.executable, "-S", "-E", "-c", _LAUNCHER, *command]
    done = subprocess.run(launched, check=True, stdout=subprocess.PIPE, text=True, env=os.environ)
    code, seconds, cpu, peak = json.loads(done.stdout)
    if code:
        raise SystemExit(f"{' '.join(command)} failed with {code}")
    return Spent(seconds, cpu, peak)
