"""Keeping the copy of a run directory, or of all segments of a live one, up to date until the recording ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_probe.errors import ProbeError
from sglang_probe.remote.copy import RunCopy
from sglang_probe.remote.target import Target, shown
from sglang_probe.run.manifest import MANIFEST

_LOOK_SECONDS = 2.0
_LONGEST_PAUSE = 60.0
_WATCH_SECONDS = 0.2
_STUCK = 10.0
"""Seconds beyond its patience after which a driver that does not come back is left where it is."""
_LINGER = 5.0
"""Seconds after the end that a run is waited for which nobody has closed: its engine may still be closing it."""


@dataclass
class State:
    """How far a copy is, as plain data."""

    to: str
    files: int = 0
    """Files that were copied by this process."""
    bytes: int = 0
    waiting: int = 0
    """Files that are on this machine and not there yet, as of the last look."""
    waiting_bytes: int = 0
    error: str | None = None
    """Why the last try failed; None: it did not."""
    failed: int = 0
    """Tries that failed in a row."""
    refused: str | None = None
    """Why nothing is copied at all; it is not tried again."""
    done: bool = False
    """Everything is there, and was closed."""
    seconds: float = 0.0
    """Since something last arrived, or since the start."""


class Follower:
    """Copies what is new, again and again.

    Args:
        folder: a run directory, or the folder of a live recording.
        single: `folder` is (or will be) one run, which is taken for closed only once the recording has ended: what
            was there before a new recording began is left alone.
        patience: seconds without progress after which the rest is given up once the recording has ended.
        tell: is given the state whenever it changes.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        folder: Path,
        target: Target,
        *,
        single: bool,
        overwrite: bool = False,
        patience: float = 300.0,
        tell: Callable[[State], None] = lambda _: None,
        pause: float = _LOOK_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._target, self._single, self._overwrite = folder, target, single, overwrite
        self._patience, self._tell, self._pause, self._clock = patience, tell, pause, clock
        self.state = State(target.url)
        self._copies: dict[str, RunCopy] = {}
        self._moved = clock()
        self.stuck = False
        """A driver did not come back; its thread still waits, and the process should end all the same."""

    def run(self, ended: threading.Event) -> State:
        """Until everything is there after `ended` was set, or nothing has moved for the time of `patience`.

        A driver may hang for good, so that it works on a thread of its own, on which nobody waits for longer.
        """
        failed: list[BaseException] = []

        def work() -> None:
            try:
                self._run(ended)
            except BaseException as e:
                failed.append(e)

        thread, over = threading.Thread(target=work, name="sglang-probe-upload", daemon=True), None
        thread.start()
        while thread.is_alive():
            thread.join(_WATCH_SECONDS)
            if over is None and ended.is_set():
                over = self._clock()
            if over is not None and self._clock() - max(over, self._moved) > self._patience + _STUCK:
                self.stuck = thread.is_alive()
                break
        if failed:
            raise failed[0]
        if self.stuck:
            self.state.error = self.state.error or f"nothing has moved for {self._patience:.0f} s: the target hangs"
        self._say()
        return self.state

    def _run(self, ended: threading.Event) -> None:
        over: float | None = None
        while self.state.refused is None:
            if over is None and ended.is_set():
                over = self._moved = self._clock()
            whole = self.turn(closed_too=over is not None or not self._single)
            if over is not None:
                idle = self._clock() - max(over, self._moved)
                nothing_left = self.state.error is None
                if whole or idle > (min(_LINGER, self._patience) if nothing_left else self._patience):
                    self.state.done = whole
                    break
            self._wait(ended, over)

    def turn(self, *, closed_too: bool = True) -> bool:
        """Copy what is missing of every run. Returns whether all were closed, and are there whole. What goes wrong is
        in `state`: a run that cannot be copied does not keep the next from it."""
        whole, errors = True, []
        self.state.waiting = self.state.waiting_bytes = 0
        for within, run in self._runs():
            copy = self._copies.setdefault(within, RunCopy(run, self._target, within, overwrite=self._overwrite))
            try:
                whole &= copy.turn(self, closed_too=closed_too)
            except FileNotFoundError as e:
                whole = False
                if run.exists():  # else a segment in which nothing was recorded
                    errors.append(_said(e))
            except ProbeError as e:
                whole = False
                if self._single:
                    self.state.refused = str(e)
                errors.append(e.message)
            except Exception as e:  # of the driver's own kind: whatever it is, it is tried again
                whole = False
                errors.append(_said(e))
        self.state.error = errors[0] if errors else None
        self.state.failed = self.state.failed + 1 if errors else 0
        self._say()
        return whole and bool(self._copies)

    def _wait(self, ended: threading.Event, over: float | None) -> None:
        pause = self._pause
        if self.state.failed:
            pause = min(self._pause * 2 ** min(self.state.failed, 10), _LONGEST_PAUSE)
        if over is None:
            ended.wait(pause)
        else:
            time.sleep(min(pause, self._patience))

    def _runs(self) -> list[tuple[str, Path]]:
        if (self._folder / MANIFEST).exists():
            return [("", self._folder)]
        found = [*self._folder.glob(f"segment-*/{MANIFEST}"), *self._folder.glob(f"dp*/segment-*/{MANIFEST}")]
        return [(f.parent.relative_to(self._folder).as_posix(), f.parent) for f in sorted(found)]

    # ---------------------------------------------------------------- `Progress` of the copies

    def waiting(self, files: int, size: int) -> None:
        """See `Progress`."""
        self.state.waiting += files
        self.state.waiting_bytes += size
        self._say()

    def moved(self) -> None:
        """See `Progress`."""
        self._moved = self._clock()
        self._say()

    def arrived(self, size: int) -> None:
        """See `Progress`."""
        self.state.files += 1
        self.state.bytes += size
        self.state.waiting -= 1
        self.state.waiting_bytes -= size
        self.moved()

    def _say(self) -> None:
        self.state.seconds = round(self._clock() - self._moved, 1)
        self._tell(self.state)


def told(state: State) -> dict[str, Any]:
    """The state as plain data."""
    return asdict(state)


def _said(error: Exception) -> str:
    text = shown(str(error)).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}"[:300]
