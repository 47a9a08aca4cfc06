"""Finished pieces of a long study on disk, so that one that was interrupted goes on where it was.

A piece is a set of tables: what one layer of a drift study says, or one batch of prompts of an eviction study. Its
place is a hash of everything that it depends on: the files of each run, the settings, the versions, and the code that
computes it. So a piece of something else is not there, rather than being recognised and left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run.damage import reading
from sglang_probe.run.files import REQUESTS_FILE
from sglang_probe.run.journal import sha256, sync_folder
from sglang_probe.run.manifest import MANIFEST
from sglang_probe.run.run import Run

FOLDER = "partials"
_CODE = ("attention", "eviction", "run", "stats", "studies")
"""Folders of the package that compute studies from runs. A change of any of them is a change of every piece."""


class Partials:
    """The pieces of one study.

    Args:
        folder: of the study; None: nothing is kept.
        depends_on: everything that the pieces depend on, as plain data.
        resume: take up what is there; otherwise it is deleted. Pieces of anything else are deleted either way.
    """

    def __init__(self, folder: Path | None, depends_on: Mapping[str, Any], *, resume: bool) -> None:
        versions = {name: version(name) for name in ("torch", "numpy", "pandas")}
        told = json.dumps({**depends_on, "code": _code_digest(), **versions}, sort_keys=True, default=str)
        self._folder = None if folder is None else folder / FOLDER / hashlib.sha256(told.encode()).hexdigest()[:32]
        if self._folder is not None and self._folder.parent.exists():
            for other in self._folder.parent.iterdir():
                if other != self._folder or not resume:
                    shutil.rmtree(other, ignore_errors=True)

    def path(self, piece: str) -> Path | None:
        """The folder of a finished piece; None: it is not there, or nothing is kept."""
        path = None if self._folder is None else self._folder / piece
        return path if path is not None and path.exists() else None

    def read(self, piece: str) -> dict[str, pd.DataFrame] | None:
        """The tables of a finished piece, by name; None where it is not there or cannot be read."""
        if (path := self.path(piece)) is None:
            return None
        try:
            with reading(path):
                return {file.stem: pd.read_parquet(file) for file in sorted(path.glob("*.parquet"))}
        except RunDirectoryError:
            shutil.rmtree(path, ignore_errors=True)  # damaged: it is computed again
            return None

    def write(self, piece: str, tables: Mapping[str, pd.DataFrame], more: Callable[[Path], None] | None = None) -> None:
        """Keep a finished piece. A kill leaves all of it or nothing.

        Args:
            more: writes further files of the piece into the folder that it is given.
        """
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        half = self._folder / f".{piece}.{os.getpid()}"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
        for name, frame in tables.items():
            frame.to_parquet(half / f"{name}.parquet", compression="zstd")
        if more is not None:
            more(half)
        for file in half.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        shutil.rmtree(self._folder / piece, ignore_errors=True)
        half.rename(self._folder / piece)
        sync_folder(self._folder)

    def discard(self) -> None:
        """The study has everything in its own tables now."""
        if self._folder is not None:
            shutil.rmtree(self._folder.parent, ignore_errors=True)


def identity(run: Run) -> dict[str, str]:
    """What a run holds, by its hashes: the journal and the manifest list those of the rows and the ledger."""
    journals = (file.name for file in run.path.glob("journal*.jsonl"))
    return {name: sha256(run.path / name) for name in sorted((MANIFEST, REQUESTS_FILE, *journals))}


@cache
def _code_digest() -> str:
    package = Path(__file__).resolve().parents[1]
    told = hashlib.sha256()
    for file in sorted(file for folder in _CODE for file in (package / folder).rglob("*.py")):
        told.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return told.hexdigest()
