"""One writer at a time: a lock on a file (`flock`), which the death of its holder releases, whatever kills it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from sglang_probe.errors import RunDirectoryError

logger = logging.getLogger("sglang_probe")

_LOOK_SECONDS = 0.05


class Held:
    """A lock that this process holds: until `release`, the end of a `with` block, or its death."""

    def __init__(self, file: Path, handle: IO[str]) -> None:
        self._file, self._handle = file, handle

    def release(self) -> None:
        """Let go, and leave no file."""
        if not self._handle.closed:
            with suppress(OSError):
                if _is(self._handle, self._file):
                    self._file.unlink()  # while it is held: who opens it from now on makes a new one
            self._handle.close()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


def hold(file: Path, taken: str, *, fix: str, wait: float = 0.0) -> Held:
    """Take the lock `file`, which is made if need be.

    Args:
        taken: what the refusal says if another process has it; which one is added.
        fix: its advice.
        wait: seconds to wait for the other: a process that was killed may still be ending.

    Raises:
        RunDirectoryError: another process has it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait
    while True:
        handle = open(file, "a+", encoding="utf-8")  # noqa: SIM115 - held for as long as the lock
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EACCES):  # a file system without locks
                logger.warning("%s cannot be locked (%s): see to it that nobody else writes there", file, e.strerror)
                return Held(file, handle)
            handle.seek(0)
            holder = handle.read().strip()
            handle.close()
            if time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS)
                continue
            raise RunDirectoryError(f"{taken}: {holder or 'which one it does not say'}", fix=fix) from None
        if _is(handle, file):
            break
        handle.close()  # its holder let go, and removed it, between the two lines above
    with suppress(OSError):  # a full disk: it is held all the same
        handle.truncate(0)
        handle.write(_this_process())
        handle.flush()
    return Held(file, handle)


def _is(handle: IO[str], file: Path) -> bool:
    """Whether the open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _this_process() -> str:
    command = " ".join([Path(sys.argv[0]).name or "python", *sys.argv[1:]])
    return f"process {os.getpid()} on {socket.gethostname()} ({command[:200]})\n"
