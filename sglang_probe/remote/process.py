"""The process that copies a recording while it is made: of the lowest priority, and none of the engine's.

    python -m sglang_probe.remote.process        # reads {"folder", "to", ...} as a line of JSON, then until the end

It learns that the recording has ended when its standard input closes, which the death of whoever started it does too.
Then it copies what is left and ends. Only one copies a folder at a time; the next waits for it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sglang_probe.errors import ProbeError
from sglang_probe.remote.config import UploadConfig
from sglang_probe.remote.follow import Follower, State, told
from sglang_probe.remote.target import Target, shown
from sglang_probe.run.lock import Held, hold

logger = logging.getLogger("sglang_probe")

_TELL_SECONDS = 0.5
COMMAND = (sys.executable, "-m", "sglang_probe.remote.process")


def hold_copy(folder: Path, *, wait: float = 0.0) -> Held:
    """Become the only one who copies a folder.

    Raises:
        RunDirectoryError: another process does.
    """
    folder = folder.resolve()
    lock = folder.with_name(f".{folder.name}.upload.lock")
    return hold(lock, f"another process copies {folder}", fix="wait until it has ended", wait=wait)


class Uploading:
    """A process that copies a folder. Nothing here waits, but `finish`.

    Args:
        folder: a run directory, which need not be there yet, or the folder of a live recording.
        single, overwrite: see `Follower`.

    Raises (on construction):
        ConfigError: the target's driver is not installed.
    """

    def __init__(self, folder: Path, config: UploadConfig, *, single: bool, overwrite: bool = False) -> None:
        Target(config.to)
        self._state = Path(tempfile.mkdtemp(prefix="sglang-probe-")) / "upload.json"
        self._last: dict[str, Any] = told(State(shown(config.to)))
        asked = {
            "folder": str(folder.resolve()),
            "to": config.to,
            "single": single,
            "overwrite": overwrite,
            "patience": config.patience,
            "state": str(self._state),
        }
        environment = {k: v for k, v in os.environ.items() if k != "SGLANG_PROBE"}
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the recording, whose end is to be copied
        )
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")
            self._process.stdin.flush()

    def state(self) -> dict[str, Any]:
        """How far it is (`State`)."""
        with suppress(OSError, ValueError):
            self._last = json.loads(self._state.read_text())
        code = self._process.poll()
        if code not in (None, 0) and not self._last["done"] and self._last["error"] is None:
            self._last["error"] = f"the process that copies ended with {code}"
        return dict(self._last)

    def end(self) -> None:
        """The recording has ended: the process copies what is left, and ends by itself."""
        with suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def finish(self, watch: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
        """`end`, and wait for it; `watch` is given its state meanwhile. Whatever ends the waiting ends the process."""
        self.end()
        try:
            while self._process.poll() is None:
                watch(self.state())
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_TELL_SECONDS)
        finally:
            if self._process.poll() is None:
                self._process.terminate()
        found = self.state()
        with suppress(OSError):
            self._state.unlink(missing_ok=True)
            self._state.parent.rmdir()
        return found


def main() -> None:
    """The process."""
    with suppress(OSError):
        os.nice(19)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked = json.loads(sys.stdin.readline())
    ended, file, last = threading.Event(), Path(asked["state"]), 0.0

    def read() -> None:
        sys.stdin.read()
        ended.set()

    def tell(state: State, *, now: bool = False) -> None:
        nonlocal last
        if not now and time.monotonic() - last < _TELL_SECONDS:
            return
        last = time.monotonic()
        with suppress(OSError):
            half = file.with_suffix(".tmp")
            half.write_text(json.dumps(told(state)))
            half.replace(file)

    threading.Thread(target=read, name="sglang-probe-upload-end", daemon=True).start()
    stuck, folder, state = False, Path(asked["folder"]), State(shown(asked["to"]))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with hold_copy(folder, wait=float("inf")):
            follower = Follower(
                folder,
                Target(asked["to"]),
                single=asked["single"],
                overwrite=asked["overwrite"],
                patience=asked["patience"],
                tell=tell,
            )
            state = follower.run(ended)
            stuck = follower.stuck
    except (ProbeError, OSError) as e:
        state.refused = str(e)
    tell(state, now=True)
    if stuck:
        os._exit(1)  # threads of the driver's would be waited for


if __name__ == "__main__":
    main()
