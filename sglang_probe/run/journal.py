"""The journal: one JSON line for every part that is safely on disk, so that a run survives `kill -9`.

A *part* is everything committed since the part before: one shard of rows per hook point and one Parquet file per
ledger table. Its files are written under temporary names, synced and renamed; then its line is appended and synced.
Files that no line names are left-overs of a crash.
Each data-parallel rank is a process of its own and keeps a journal of its own; the reader takes all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run.lock import Held, hold

NAME = "journal.jsonl"
"""The journal of data-parallel rank 0; rank n writes `journal-dp<n>.jsonl`."""


NAMES = r"journal(-dp\d+)?\.jsonl"
"""Of all ranks, as a regular expression."""

_OF_A_RANK = re.compile(r"(?:journal-dp(\d+)\.jsonl|\.lock-dp(\d+))")


@dataclass(frozen=True)
class Part:
    """One durable part of one rank's recording. `files` maps paths relative to the run directory to their SHA-256."""

    number: int
    session: int
    forwards_end: int  # one past the last forward of this part
    rows_end: int  # one past the last row number of this part
    rows: int  # row numbers given out in it
    files: dict[str, str] = field(default_factory=dict)
    dp_rank: int = 0

    @property
    def stem(self) -> str:
        """How the names of its files end."""
        return f"{self.number:05d}" if self.dp_rank == 0 else f"dp{self.dp_rank}-{self.number:05d}"

    def check(self) -> None:
        """Whether a line holds what a part does.

        Raises:
            ValueError: names the field.
        """
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "files":
                good = isinstance(value, dict) and all(isinstance(x, str) for kv in value.items() for x in kv)
            else:
                good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not good:
                raise ValueError(f"`{f.name}` of a part is {json.dumps(value)[:60]}")


def read(run: Path) -> list[Part]:
    """Parts of a run, rank by rank, in order. A torn last line (a crash while appending) is ignored.

    Raises:
        RunDirectoryError: a line that is not the last cannot be read.
    """
    return [part for rank in ranks(run) for part in read_rank(run, rank)]


def ranks(run: Path) -> list[int]:
    """Data-parallel ranks that have a journal, or a lock; rank 0 in any case."""
    named = (_OF_A_RANK.fullmatch(p.name) for p in run.iterdir()) if run.is_dir() else ()
    return sorted({0, *(int(match[1] or match[2]) for match in named if match)})


def read_rank(run: Path, dp_rank: int) -> list[Part]:
    """Parts of one data-parallel rank; as `read`."""
    path = run / name_of(dp_rank)
    if not path.exists():
        return []
    try:
        *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
        parts = [Part(**json.loads(line)) for line in lines]
        for part in parts:
            part.check()
    except (OSError, ValueError, TypeError) as e:
        raise RunDirectoryError(
            f"{path} is damaged: {e}", fix="restore it; parts that it does not name are unknown"
        ) from e
    return parts


def append(run: Path, part: Part) -> None:
    """Append a part and wait until it is on disk. A torn last line of an earlier crash is cut off first.

    Raises:
        OSError: the disk does not take it; the journal is as before, so that it can be tried again.
    """
    with open(run / name_of(part.dp_rank), "a+b", buffering=0) as f:
        f.seek(0)
        end = f.readall().rfind(b"\n") + 1
        f.truncate(end)
        try:
            line = memoryview(json.dumps(asdict(part)).encode() + b"\n")
            while line:
                line = line[f.write(line) :]
            os.fsync(f.fileno())
            sync_folder(run)
        except BaseException:
            f.truncate(end)
            raise


def lock(run: Path, dp_rank: int, *, wait: float = 10.0) -> Held:
    """Become the only writer of a rank's parts.

    Args:
        wait: seconds to wait for another writer: an engine that was killed may still be ending.

    Raises:
        RunDirectoryError: another process writes there.
    """
    name = ".lock" if dp_rank == 0 else f".lock-dp{dp_rank}"
    return hold(run / name, f"another process writes into {run}", fix="wait until it ends, or end it", wait=wait)


def name_of(dp_rank: int) -> str:
    """The journal of a data-parallel rank."""
    return NAME if dp_rank == 0 else f"journal-dp{dp_rank}.jsonl"


def is_journal(name: str) -> bool:
    """Whether a file is a journal by its name."""
    return re.fullmatch(NAMES, name) is not None


def write_durably(path: Path, write: Callable[[Path], None]) -> str:
    """Write a file through a temporary name, sync, rename. Returns its SHA-256. Nothing is left of one that fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        digest = sha256(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return digest


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_of_text(text: str) -> str:
    """SHA-256 of the file that `write_text_durably` makes of a text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_durably(path: Path, text: str) -> None:
    """Replace a small text file in one step."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_durably(path, write)


def discard_leftovers(run: Path) -> list[str]:
    """Delete files under `ledger/`, `rows/` and `telemetry/` that no journal line names, and half-written ones beside
    them. Returns their paths. Only for the writer of the run."""
    for temporary in run.glob(".*.tmp"):
        temporary.unlink()
    named = {name for part in read(run) for name in part.files}
    removed = []
    for folder in ("ledger", "rows", "telemetry"):
        for path in sorted((run / folder).rglob("*")) if (run / folder).exists() else []:
            relative = path.relative_to(run).as_posix()
            if path.is_file() and relative not in named:
                path.unlink()
                removed.append(relative)
    return removed
