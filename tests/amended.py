"""Changing a run on disk as its writers would have: with the hashes of what was changed written anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_probe.run import journal, seal
from sglang_probe.run.manifest import MANIFEST


def amend(path: Path, change: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
    """Change a closed run's manifest, and write every hash again: the journal's, the manifest's and the seal's."""
    parts = journal.read(path)
    for file in path.glob("journal*.jsonl"):
        file.unlink()
    for part in parts:
        for name in part.files:
            if (path / name).is_file():
                part.files[name] = journal.sha256(path / name)
        journal.append(path, part)
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if seal.closed(manifest):
        manifest["files"] = {name: digest for part in parts for name, digest in part.files.items()}
    kept = manifest.get("kept")
    if isinstance(kept, dict) and "sha256" in kept and (path / str(kept.get("file"))).is_file():
        kept["sha256"] = journal.sha256(path / kept["file"])
    change(manifest)
    if (path / seal.NAME).exists():
        seal.close(path, manifest)
    else:
        journal.write_text_durably(path / MANIFEST, json.dumps(manifest))
