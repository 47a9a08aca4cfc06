"""The seal of a run: `seal.json` holds the SHA-256 of every file that no journal line names, the manifest and the
journals themselves among them.

The journal has the hashes of what is written while a run is recorded. What is written when it is closed
(`requests.parquet`, the embedding oracle, the manifest) and beside it (the engine's configuration, kept sets, the
dataset card) is under the seal. It is written *before* the manifest that says how the run ended, and holds that
manifest's hash: so a manifest that lists files has a seal, whenever the power goes, and a seal beside a manifest that
lists none is of an earlier end of the same run (`closed`).

Files and folders that users or studies put beside (`coverage/`, `report.html`) are none of the seal's business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run import journal
from sglang_probe.run.damage import FIX, reading
from sglang_probe.run.manifest import MANIFEST, manifest_text

NAME = "seal.json"
SINCE_SCHEMA = 5
FOLDERS = ("ledger", "rows", "telemetry")
"""Folders whose every file is named by the journal."""

_OURS = re.compile(
    rf"{journal.NAMES}|requests\.parquet|embedding\.parquet|README\.md|probe\.yaml|kept.*\.safetensors"
    r"|interventions\.json|fault\.txt|scores\.safetensors"
)


def close(run: Path, manifest: Mapping[str, Any]) -> None:
    """Seal a run and write its last manifest, which must have `files`."""
    files = {name: journal.sha256(run / name) for name in ours(run)}
    _write(run, {**files, MANIFEST: journal.sha256_of_text(manifest_text(manifest))})
    journal.write_text_durably(run / MANIFEST, manifest_text(manifest))


def add(run: Path, name: str) -> None:
    """Note that we wrote a file of a sealed run anew: the dataset card. A run without a seal stays without one."""
    if (run / NAME).exists():
        _write(run, {**read(run), name: journal.sha256(run / name)})


def closed(manifest: Mapping[str, Any]) -> bool:
    """Whether this manifest is the one with which a run was closed."""
    return "files" in manifest


def read(run: Path) -> dict[str, str]:
    """SHA-256 by name, the manifest's included.

    Raises:
        RunDirectoryError: there is no seal, or it is damaged.
    """
    with reading(run / NAME):
        files = json.loads((run / NAME).read_text(encoding="utf-8"))["files"]
    if not isinstance(files, dict) or not all(isinstance(x, str) for kv in files.items() for x in kv):
        raise RunDirectoryError(f"{run / NAME} is damaged: it lists no files", fix=FIX)
    return files


def ours(run: Path) -> list[str]:
    """Files beside the manifest that are ours by their name, sorted."""
    return sorted(p.name for p in run.iterdir() if is_ours(p.name))


def is_ours(name: str) -> bool:
    """Whether a file beside the manifest is ours by its name."""
    return _OURS.fullmatch(name) is not None


def _write(run: Path, files: Mapping[str, str]) -> None:
    journal.write_text_durably(run / NAME, json.dumps({"files": dict(sorted(files.items()))}, indent=1) + "\n")
