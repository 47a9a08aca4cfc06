"""A copy of one run directory on a target, brought up to date while the run is recorded.

What is there is told by the copy itself: its journal names the parts whose files have all arrived, its seal the rest.
So nothing is noted on this machine, and any machine that has the run can go on with the copy.

    while it is recorded    manifest (it says that the run is not closed), files of the parts, then the journal that
                            names them
    once it was closed      what is missing of the parts, the journal, what lies beside, the seal; last the manifest

A copy whose manifest says that the run is closed is therefore whole. Before anything is replaced that such a manifest
speaks of, it is taken away.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from sglang_probe.errors import RunDirectoryError
from sglang_probe.remote.target import Target
from sglang_probe.run import journal, seal
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.manifest import MANIFEST

_CARD = "README.md"
_JOURNAL_EVERY = 8
"""Parts after which the journal of the copy is brought up to date, if there are many to be copied."""


class Progress(Protocol):
    """Is told what happens to a copy."""

    def waiting(self, files: int, size: int) -> None:
        """So many files, and bytes, are to be copied now."""

    def moved(self) -> None:
        """It goes on."""

    def arrived(self, size: int) -> None:
        """A file of so many bytes is there."""


class RunCopy:
    """The copy of one run.

    Args:
        run: the run directory; another process may be writing it.
        within: folder of the target; empty: the target itself.
        overwrite: delete another run that is there.
    """

    def __init__(self, run: Path, target: Target, within: str = "", *, overwrite: bool = False) -> None:
        self.run, self._target, self._within, self._overwrite = run, target, within, overwrite
        self._there: dict[str, str] | None = None
        """SHA-256 of what the target holds, by name; None: not looked yet."""
        self._closed_there = False
        self._done: tuple[int, ...] = ()
        """Times of the lists with which everything was there."""
        self._hashed: dict[str, tuple[tuple[int, int], str]] = {}
        """Time, size and SHA-256 of what lies beside the parts: kept sets are large, and looked at again and again."""

    def turn(self, progress: Progress, *, closed_too: bool = True) -> bool:
        """Copy what is missing.

        Args:
            closed_too: also of a run that was closed; else such a run is left alone.

        Returns whether the run was closed and all of it is there.

        Raises:
            RunDirectoryError: the target holds something else, or the run is damaged.
            Exception: of the file system's own kind; to be tried again.
        """
        times = self._times()
        if times and times == self._done:
            return True
        text = (self.run / MANIFEST).read_bytes()
        closed = seal.closed(json.loads(text))
        parts = journal.read(self.run)
        if (closed and not closed_too) or not (closed or parts):
            return False
        if self._there is None or self._is_another(parts, self._there):
            self._there = self._look(parts)
        beside = self._beside(closed=closed)
        self._tell(progress, parts, beside)
        if closed:
            self._close(parts, beside, text, progress)
            self._done = times
        else:
            self._small(MANIFEST, text)
            self._closed_there = False
            self._files(beside, progress)
            self._parts(parts, progress)
        return closed

    def _close(self, parts: list[journal.Part], beside: dict[str, str], text: bytes, progress: Progress) -> None:
        sealed = (self.run / seal.NAME).read_bytes() if (self.run / seal.NAME).exists() else b""
        if self._closed_there and self._known.get(seal.NAME) != _digest(sealed):
            self._take_away(MANIFEST)
            self._closed_there = False
        self._parts(parts, progress)
        self._files(beside, progress)
        if sealed:
            self._small(seal.NAME, sealed)
        self._small(MANIFEST, text)
        self._closed_there = True

    @property
    def _known(self) -> dict[str, str]:
        assert self._there is not None
        return self._there

    def _beside(self, *, closed: bool) -> dict[str, str]:
        """SHA-256 of what is neither part, list nor manifest. Of a run that is recorded, what a resumed one needs."""
        if closed and (self.run / seal.NAME).exists():
            named = seal.read(self.run)
            return {n: d for n, d in named.items() if n != MANIFEST and not journal.is_journal(n)}
        left_out = set() if closed else {REQUESTS_FILE, _CARD}
        names = [n for n in seal.ours(self.run) if n not in left_out and not journal.is_journal(n)]
        return {n: self._sha256(n) for n in names}

    def _sha256(self, name: str) -> str:
        about = (self.run / name).stat()
        state = (about.st_mtime_ns, about.st_size)
        if name not in self._hashed or self._hashed[name][0] != state:
            self._hashed[name] = (state, journal.sha256(self.run / name))
        return self._hashed[name][1]

    def _tell(self, progress: Progress, parts: list[journal.Part], beside: dict[str, str]) -> None:
        wanted = {**beside, **{n: d for part in parts for n, d in part.files.items()}}
        missing = [self.run / n for n, d in wanted.items() if self._known.get(n) != d]
        progress.waiting(len(missing), sum(f.stat().st_size for f in missing))

    def _parts(self, parts: list[journal.Part], progress: Progress) -> None:
        """Files first, then the journal that names them, rank by rank."""
        for rank in sorted({p.dp_rank for p in parts}):
            name = journal.name_of(rank)
            lines = (self.run / name).read_bytes().split(b"\n")
            mine = [p for p in parts if p.dp_rank == rank]
            for done, part in enumerate(mine, start=1):
                new = any(self._known.get(n) != d for n, d in part.files.items())
                self._files(part.files, progress)
                if done == len(mine) or (new and done % _JOURNAL_EVERY == 0):
                    self._small(name, b"\n".join(lines[:done]) + b"\n")

    def _files(self, files: dict[str, str], progress: Progress) -> None:
        for name, digest in files.items():
            if self._known.get(name) != digest:
                self._target.put(self.run / name, self._name(name), progress.moved)
                self._known[name] = digest
                progress.arrived((self.run / name).stat().st_size)

    def _small(self, name: str, data: bytes) -> None:
        if self._known.get(name) != _digest(data):
            self._target.put_bytes(data, self._name(name))
            self._known[name] = _digest(data)

    def _take_away(self, name: str) -> None:
        self._target.remove(self._name(name))
        self._known.pop(name, None)

    def _look(self, parts: list[journal.Part]) -> dict[str, str]:
        """What the target holds of this run.

        Raises:
            RunDirectoryError: it holds something else.
        """
        sizes = self._target.sizes(self._within)
        for name in [n for n in sizes if Target.is_temporary(n)]:
            self._target.remove(self._name(name))
            del sizes[name]
        if strange := sorted(n for n in sizes if not _is_of_a_run(n)):
            raise RunDirectoryError(
                f"{self._where} is not empty, and {strange[0]} is no file of a run", fix="choose another target"
            )
        lists = {n: self._target.read(self._name(n)) or b"" for n in sizes if _is_list(n)}
        there = {n: _digest(data) for n, data in lists.items()}
        theirs = _parts_of(lists)
        named = {n: d for part in theirs for n, d in part.files.items()}
        if self._is_another(parts, named, theirs):
            if not self._overwrite:
                raise RunDirectoryError(
                    f"{self._where} holds another run than {self.run}",
                    fix="choose another target, or --overwrite, which deletes what is there first",
                )
            for name in sorted(sizes, key=lambda n: (n != MANIFEST, not _is_list(n))):
                self._target.remove(self._name(name))
            self._closed_there = False
            return {}
        told = _json(lists.get(MANIFEST, b""))
        self._closed_there = told is not None and seal.closed(told)
        sealed = (_json(lists.get(seal.NAME, b"")) or {}).get("files", {})
        for name, digest in {**sealed, **named}.items():
            file = self.run / name
            if name not in there and file.exists() and sizes.get(name) == file.stat().st_size:
                there[name] = digest
        return there

    def _is_another(
        self, parts: list[journal.Part], there: dict[str, str], theirs: Iterable[journal.Part] = ()
    ) -> bool:
        """Whether what is there cannot be the beginning of this run."""
        ours = {n: d for part in parts for n, d in part.files.items()}
        in_parts = {n: d for n, d in there.items() if n.split("/")[0] in seal.FOLDERS}
        missing = {(p.dp_rank, p.number) for p in theirs} - {(p.dp_rank, p.number) for p in parts}
        return bool(missing) or any(ours.get(n) != d for n, d in in_parts.items())

    def _times(self) -> tuple[int, ...]:
        try:
            return tuple((self.run / n).stat().st_mtime_ns for n in (MANIFEST, seal.NAME))
        except FileNotFoundError:
            return ()

    @property
    def _where(self) -> str:
        return f"{self._target.url}/{self._within}".rstrip("/")

    def _name(self, name: str) -> str:
        return f"{self._within}/{name}" if self._within else name


def _parts_of(lists: dict[str, bytes]) -> list[journal.Part]:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in lists.items():
            if journal.is_journal(name):
                (Path(folder) / name).write_bytes(data)
        return journal.read(Path(folder))


def _is_of_a_run(name: str) -> bool:
    return name.split("/")[0] in seal.FOLDERS or seal.is_ours(name) or _is_list(name)


def _is_list(name: str) -> bool:
    return name in (MANIFEST, seal.NAME) or journal.is_journal(name)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(data: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
