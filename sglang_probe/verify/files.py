"""Every file of a run directory is there, under its hash, and can be read; the journal's parts follow each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sglang_probe.run import journal, schema, seal
from sglang_probe.run.damage import reading
from sglang_probe.run.files import no_run
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run
from sglang_probe.verify.check import Check

Progress = Callable[[str, int, int], None]
"""Told what is being read, and how much of how many of it is done."""


def nothing(_what: str, _done: int, _of: int) -> None:
    """No progress is shown."""


def files_intact(run: Run, *, progress: Progress = nothing) -> Check:
    """Every file that the journal or the seal names is present with its hash, and no other looks like ours."""
    name, claim = "files", "every file has the SHA-256 that was recorded when it was written, and none is unknown"
    listed = run.recorded_files()
    sealed, note = _sealed(run)
    violation = note if sealed is None else None
    files = {**(sealed or {}), **listed}
    violation = violation or _wrong_file(run.path, files, progress) or _kept(run) or _parts(run.parts())
    if violation is None:
        strange = _strange(run.path, set(files), covered=bool(sealed))
        if strange and run.complete:
            violation = f"{strange[0]} is in no list: it looks like a file of this run, and is none"
        elif strange:
            note = f"{note}; " if note else ""
            note += f"{len(strange)} files are in no list, e.g. {strange[0]}: left-overs, which --resume deletes"
    return Check(name, claim, len(files), "files", violation, None if violation == note else note)


def _sealed(run: Run) -> tuple[dict[str, str] | None, str | None]:
    """Files under the seal, and what is to be said of it; None: there should be one, and what is wrong."""
    manifest = run.manifest
    if not seal.closed(manifest):
        if manifest["schema_version"] >= seal.SINCE_SCHEMA and run.complete:
            return None, f"{MANIFEST} says that the run is complete, and does not list its files"
        return {}, f"the run was not closed: only what {journal.NAME} names is under a hash"
    if not (run.path / seal.NAME).exists():
        if manifest["schema_version"] >= seal.SINCE_SCHEMA:
            return None, f"{seal.NAME} is missing: the run was closed, and had one then"
        return {}, (
            f"schema {manifest['schema_version']} has no seal: {MANIFEST}, requests.parquet and what else "
            f"{journal.NAME} does not name are under no hash, and compared with the ledger alone"
        )
    files = seal.read(run.path)
    if MANIFEST not in files:
        return None, f"{seal.NAME} is damaged: it does not name {MANIFEST}"
    return files, None


def _wrong_file(path: Path, files: dict[str, str], progress: Progress) -> str | None:
    for done, (f, digest) in enumerate(files.items()):
        progress("files", done, len(files))
        file = path / f
        if not file.exists():
            return f"{f} is missing"
        if not file.is_file():
            return f"{f} is a directory"
        with reading(file):
            if journal.sha256(file) != digest:
                return f"{f} was changed after it was written"
    return None


def _kept(run: Run) -> str | None:
    """The kept sets, which the manifest of any schema has the hash of."""
    told = run.manifest.get("kept")
    if not told:
        return None
    file = run.path / str(told.get("file"))
    if not file.is_file():
        return f"{file.name} is missing, the kept sets of this run"
    return None if journal.sha256(file) == told.get("sha256") else f"{file.name} was changed after it was written"


def _parts(parts: list[journal.Part]) -> str | None:
    """Parts of each rank are numbered from 0, their rows and forwards rise, and their files are named after them."""
    before: dict[int, journal.Part] = {}
    for part in parts:
        zero = part.dp_rank << schema.RANK_SHIFT
        last = before.get(part.dp_rank, journal.Part(-1, 0, zero, zero, 0, dp_rank=part.dp_rank))
        where = f"part {part.number}" + (f" of rank {part.dp_rank}" if part.dp_rank else "")
        if part.number != last.number + 1:
            return f"{where} of the journal follows part {last.number}"
        if part.session < last.session or part.forwards_end < last.forwards_end:
            return f"{where} of the journal is older than the one before it"
        if part.rows_end - part.rows != last.rows_end:
            begin = part.rows_end - part.rows
            return f"{where} of the journal has rows from {begin}, the one before it up to {last.rows_end}"
        if wrong := [
            f for f in part.files if not Path(f).stem.endswith(f"-{part.stem}") or Path(f).parts[0] not in seal.FOLDERS
        ]:
            return f"{where} of the journal names {wrong[0]}, which is not a name of its files"
        before[part.dp_rank] = part
    return None


def _strange(path: Path, known: set[str], *, covered: bool) -> list[str]:
    """Files that look like ours and are in no list. Cards and faults can be older than seals, or a user's."""
    found = [f for f in seal.ours(path) if f not in known and f != "README.md"] if covered else []
    for folder in seal.FOLDERS:
        files = sorted(f for f in (path / folder).rglob("*") if not f.is_dir())
        found += [name for f in files if (name := f.relative_to(path).as_posix()) not in known]
    return found


def readable(path: Path) -> str | None:
    """Why a folder that looks like a run directory cannot be opened at all; None if it is no run directory.

    Raises:
        RunDirectoryError: nothing in it looks like a run.
    """
    if (path / MANIFEST).exists():
        return None
    if path.is_dir() and any((path / name).exists() for name in (journal.NAME, seal.NAME, "ledger")):
        return f"{MANIFEST} is missing"
    raise no_run(path)
