"""What goes wrong in the soak: drawn from a round's number, and brought about by signals and by `faults.c`."""

from __future__ import annotations

import errno
import os
import random
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

KILLS = ("engine killed", "command killed", "all killed")
"""SIGKILL. In a live round there is no command, and a kill is of the engine or of all of the server's processes."""
ENDED = "command ended"
"""SIGTERM; in a live round, of the server's first process."""
DISK = ("disk full", "disk broken", "sync fails", "rename fails")
OTHERS = ("short writes", "disk slow", "clock forward", "clock back")
SIGNALS = (*KILLS, ENDED)
ALL = (*SIGNALS, *DISK, *OTHERS)
_FAILS = {"disk full": "ws", "disk broken": "wsr", "sync fails": "s", "rename fails": "r"}
"""Calls that fail, as `faults.c` names them."""


@dataclass(frozen=True)
class Mishap:
    """One thing that goes wrong with one command, or one life of a server."""

    kind: str
    starting: bool = False
    """Of a signal: it is sent `wait` seconds after the start; else as long after the engine began to record."""
    wait: float = 0.0
    after: int = 0
    """Bytes that a process writes before the disk fails."""
    slow_us: int = 0
    jump: int = 0
    jump_after: int = 0

    def environment(self, shim: Path, folder: Path, mark: Path, when: Path | None = None) -> dict[str, str]:
        """What the processes are started with.

        Args:
            folder: files at or below it are concerned.
            mark: is made when it comes about.
            when: the disk fails only while this file exists, and from the first byte on.
        """
        if self.kind in SIGNALS:
            return {}
        env = {"LD_PRELOAD": str(shim), "SOAK_DIR": str(folder), "SOAK_MARK": str(mark)}
        if self.kind in DISK:
            number = errno.ENOSPC if self.kind == "disk full" else errno.EIO
            env |= {"SOAK_FAILS": _FAILS[self.kind], "SOAK_ERRNO": str(number)}
            return env | ({"SOAK_AFTER": str(self.after)} if when is None else {"SOAK_WHEN": str(when)})
        if self.kind == "short writes":
            return env | {"SOAK_SHORT": "1"}
        if self.kind == "disk slow":
            return env | {"SOAK_SLOW_US": str(self.slow_us)}
        return env | {"SOAK_JUMP": str(self.jump), "SOAK_JUMP_AFTER": str(self.jump_after)}


def mishaps_of(number: int, count: int, kinds: Sequence[str] = ALL) -> list[Mishap]:
    """What goes wrong with the first commands of a round: kills in half of them, anything else in the others."""
    rng = random.Random(f"mishaps {number}")
    signals, others = [k for k in kinds if k in SIGNALS], [k for k in kinds if k not in SIGNALS]
    return [_drawn(rng, rng.choice(signals if rng.random() < 0.55 else others)) for _ in range(count)]


def _drawn(rng: random.Random, kind: str) -> Mishap:
    starting = rng.random() < 0.25
    return Mishap(
        kind,
        starting=starting,
        wait=round(rng.uniform(0, 12) if starting else min(rng.expovariate(1 / 1.5), 10.0), 2),
        after=rng.choice([0, 3_000, 50_000, 400_000, 3_000_000]),
        slow_us=rng.choice([20_000, 200_000]),
        jump=rng.choice([2, 60, 86_400]) * (-1 if kind == "clock back" else 1),
        jump_after=rng.randint(5, 25),
    )


def build_shim(folder: Path) -> Path:
    """Compile `faults.c` into a library for LD_PRELOAD.

    Raises:
        subprocess.CalledProcessError, FileNotFoundError: there is no C compiler, or it fails.
    """
    shim = folder / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-o", str(shim), str(source), "-ldl"], check=True)
    return shim


def recorder_of(run: Path) -> int | None:
    """Process id of an engine that writes below a run or live directory; None if none does."""
    for lock in sorted(run.glob(".lock*")):
        try:
            if found := re.match(r"process (\d+)", lock.read_text()):
                os.kill(int(found[1]), 0)
                return int(found[1])
        except (OSError, UnicodeDecodeError):
            continue
    return None
