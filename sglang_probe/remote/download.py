"""Fetching a copy: every file against its hash, and the folder is there with everything or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from sglang_probe.errors import ProbeError, RunDirectoryError
from sglang_probe.remote.target import Target, shown
from sglang_probe.run import journal, seal
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.manifest import MANIFEST

_TRIES = 5
T = TypeVar("T")
Moved = Callable[[str, int, int], None]
"""Told of a file that is there, how many of how many that makes."""


def download(target: Target, folder: Path, *, moved: Moved = lambda *_: None, pause: float = 1.0) -> dict[str, str]:
    """Fetch a run, or all segments of a live recording, into a folder that does not exist yet.

    What was fetched before a failure is kept beside it (`.<name>.partial`) and taken up the next time.

    Args:
        pause: seconds before the first new try of what failed; each later one waits twice as long.

    Returns the status of each run by its path in the folder, `""` for the folder itself.

    Raises:
        RunDirectoryError: the folder exists, the target holds no run, or a file is not what its hash says.
        ProbeError: the target cannot be read.
    """
    if folder.exists():
        raise RunDirectoryError(f"{folder} exists", fix="name another folder")
    sizes = _tried(lambda: target.sizes(), target.url, pause)
    runs = sorted(str(PurePosixPath(n).parent) for n in sizes if PurePosixPath(n).name == MANIFEST)
    if strange := next((n for n in sizes if ".." in PurePosixPath(n).parts), None):
        raise RunDirectoryError(f"{target.url} holds {strange}, which would be written outside of {folder}")
    if not runs:
        raise RunDirectoryError(
            f"{target.url} holds no run: there is no {MANIFEST}", fix="give the URL that it was uploaded to"
        )
    half = folder.with_name(f".{folder.name}.partial")
    _leave(half, set(sizes))  # it may be of another source
    found, fetched = {}, set[str]()
    for place in runs:
        within = "" if place == "." else place
        mine = {str(PurePosixPath(n).relative_to(place)) for n in sizes if PurePosixPath(n).is_relative_to(place)}
        found[within], named = _fetch(target, within, mine, half / within, moved, pause)
        fetched |= {f"{within}/{n}" if within else n for n in named}
    _leave(half, fetched)
    half.rename(folder)
    journal.sync_folder(folder.absolute().parent)
    return found


def _fetch(
    target: Target, within: str, names: set[str], folder: Path, moved: Moved, pause: float
) -> tuple[str, set[str]]:
    """Returns the run's status, and the names of its files."""
    where = f"{target.url}/{within}".rstrip("/")

    fetched = set[str]()

    def get(name: str) -> str:
        """Returns its SHA-256."""
        fetched.add(name)
        remote = f"{within}/{name}" if within else name
        return _tried(
            lambda: journal.write_durably(folder / name, lambda p: target.fetch(remote, p)), f"{where}/{name}", pause
        )

    try:
        get(MANIFEST)
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError("it is no object of JSON")
        closed = seal.closed(manifest)
        lists = sorted(n for n in names if journal.is_journal(n))
        for name in lists:
            get(name)
        wanted = {n: d for part in journal.read(folder) for n, d in part.files.items()}
        if closed and seal.NAME in names:
            get(seal.NAME)
            wanted = {**seal.read(folder), **wanted}
        elif not closed:  # what a resumed run needs; it is under no hash yet
            for name in sorted(n for n in names if seal.is_ours(n) and n not in lists and n != REQUESTS_FILE):
                get(name)
    except ValueError as e:
        raise RunDirectoryError(f"{where}/{MANIFEST} is damaged: {e}", fix="upload the run again") from e
    for done, (name, digest) in enumerate(sorted(wanted.items()), start=1):
        file = folder / name
        if name not in names:
            raise RunDirectoryError(f"{where}/{name} is missing", fix="upload the run again")
        held = journal.sha256(file) if file.exists() else None
        if held != digest:
            held = get(name)
        if held != digest:
            raise RunDirectoryError(
                f"{where}/{name} is not what was recorded: its SHA-256 is another",
                fix="upload it again, or wait if it is being uploaded now",
            )
        moved(name, done, len(wanted))
    return str(manifest.get("status")), fetched | set(wanted)


def _leave(folder: Path, names: set[str]) -> None:
    """Delete every file in a folder but these."""
    for file in list(folder.rglob("*")):
        if not file.is_dir() and file.relative_to(folder).as_posix() not in names:
            file.unlink()


def _tried(get: Callable[[], T], what: str, pause: float) -> T:
    """Try again with longer and longer pauses."""
    for attempt in range(_TRIES):
        try:
            return get()
        except FileNotFoundError as e:
            raise RunDirectoryError(f"{what} is missing", fix="upload the run again") from e
        except ProbeError:
            raise
        except Exception as e:  # of the driver's own kind
            if attempt == _TRIES - 1:
                raise ProbeError(f"{what} cannot be read: {type(e).__name__}: {shown(str(e))}") from e
            time.sleep(pause * 2**attempt)
    raise AssertionError
