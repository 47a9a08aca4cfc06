"""Files of rows that wait to be fetched, in a folder that only this user can read; and marks of those that do not.

What lies there is known in memory: no listing, no `stat`. The process that serves HTTP reads `<name>.safetensors` and
`<name>.gone`, and leaves an empty file in `fetched/` for what it has sent.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run.lock import hold

if TYPE_CHECKING:
    from sglang_probe.engine.live.config import AnswersConfig

GONE = ".gone"
SUFFIX = ".safetensors"
FETCHED = "fetched"
_RANK = "dp"

EXPIRED, FULL, STOPPED, LATE = "expired", "full", "stopped", "late"
WHY = {
    EXPIRED: "the rows under this handle have expired: `live: {rows: {seconds, megabytes}}` bounds them",
    FULL: "there was no room for the rows under this handle: others wait to be fetched (`live: {rows: {megabytes}}`)",
    STOPPED: "the recording was stopped while the request with this handle was served, so its rows are not there; "
    "`GET /probe/status` says why it stopped",
    LATE: "the server could not keep up with the rows, so those under this handle are not there",
}
"""What a mark says."""

_GONE_SECONDS = 3600.0
MOST = 4096
"""Files that wait, and marks, at most."""


def rank_folder(root: Path, dp_rank: int) -> Path:
    """Where the rows of one data-parallel rank wait."""
    return root / f"{_RANK}{dp_rank}"


def rank_folders(root: Path) -> list[Path]:
    """Those that are there."""
    return sorted(p for p in root.glob(f"{_RANK}[0-9]*") if p.is_dir())


def clear(root: Path, dp_rank: int, ranks: int) -> None:
    """Remove what an earlier server left: of this rank, and, for the first rank, of those that are no more.

    To be called by who holds the lock of the recording. What another running server has is left alone.
    """
    for folder in rank_folders(root):
        number = int(folder.name.removeprefix(_RANK)) if folder.name.removeprefix(_RANK).isdigit() else -1
        if number == dp_rank or (dp_rank == 0 and number >= ranks):
            try:
                with hold(root / f"{folder.name}.lock", "another server keeps rows there", fix=""):
                    shutil.rmtree(folder, ignore_errors=True)
            except RunDirectoryError:
                continue


class AnswerFiles:
    """The files of one rank. The folder is made anew.

    Raises:
        RunDirectoryError: another server keeps rows there.
    """

    def __init__(self, folder: Path, config: AnswersConfig) -> None:
        self._folder, self._config = folder, config
        fix = "give each server its own `run`"
        self._held = hold(folder.with_name(f"{folder.name}.lock"), f"another server keeps rows in {folder}", fix=fix)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        (folder / FETCHED).mkdir(mode=0o700)
        self._files: dict[str, tuple[float, int]] = {}  # when it was written, and its size; the oldest first
        self._fetched: dict[str, None] = {}
        self._marks: dict[str, float] = {}
        self._total = 0

    def used(self, name: str) -> bool:
        """Whether something is known of this name."""
        return name in self._files or name in self._marks

    def add(self, name: str, nbytes: int, write: Callable[[Path], None]) -> bool:
        """Have a file of about so many bytes written, if there is room: what was fetched goes for it, and nothing that
        waits to be fetched does. Returns whether there was."""
        self.expire()
        if not self._has_room(nbytes):
            self._look_what_was_fetched()
            while self._fetched and not self._has_room(nbytes):
                self._remove(next(iter(self._fetched)))
        if not self._has_room(nbytes):
            self.mark(name, FULL)
            return False
        made, place = self._folder / f"{name}.partial", self._folder / f"{name}{SUFFIX}"
        try:
            write(made)
            size = made.stat().st_size
            os.replace(made, place)
        finally:
            made.unlink(missing_ok=True)
        self._files[name] = (time.time(), size)
        self._total += size
        return True

    def mark(self, name: str, why: str) -> None:
        """Whoever comes for this name is told why nothing is there: for an hour, or until there are `MOST` later ones.

        Args:
            why: a key of `WHY`.
        """
        made = self._folder / f"{name}.marked"  # never seen half-written
        made.write_text(why)
        os.replace(made, self._folder / f"{name}{GONE}")
        self._marks.pop(name, None)
        self._marks[name] = time.time()
        while len(self._marks) > MOST:
            self._unmark(next(iter(self._marks)))

    def expire(self) -> None:
        """Take away what is too old."""
        now = time.time()
        while self._files and now - next(iter(self._files.values()))[0] > self._config.seconds:
            self._remove(next(iter(self._files)))
        while self._marks and now - next(iter(self._marks.values())) > _GONE_SECONDS:
            self._unmark(next(iter(self._marks)))

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._held.release()

    def _has_room(self, nbytes: int) -> bool:
        return self._total + nbytes <= self._config.megabytes * 1e6 and len(self._files) < MOST

    def _look_what_was_fetched(self) -> None:
        with os.scandir(self._folder / FETCHED) as listed:
            names = [entry.name for entry in listed]
        for name in names:
            (self._folder / FETCHED / name).unlink(missing_ok=True)
        known = sorted({n for n in names if n in self._files}, key=lambda n: self._files[n])
        self._fetched.update(dict.fromkeys(known))

    def _remove(self, name: str) -> None:
        self._total -= self._files.pop(name)[1]
        self._fetched.pop(name, None)
        self.mark(name, EXPIRED)
        (self._folder / f"{name}{SUFFIX}").unlink(missing_ok=True)

    def _unmark(self, name: str) -> None:
        del self._marks[name]
        (self._folder / f"{name}{GONE}").unlink(missing_ok=True)
