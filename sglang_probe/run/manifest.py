"""The manifest of a run directory: what every one has, and replacing it."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sglang_probe.run import journal, schema

MANIFEST = "manifest.json"


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest in one step."""
    journal.write_text_durably(path / MANIFEST, json.dumps(manifest, indent=2, default=str) + "\n")


def new_manifest(**fields: Any) -> dict[str, Any]:
    """The fields of every manifest: versions and machine, then `fields`."""
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("sglang-probe", "sglang", "torch", "transformers")},
        "python": platform.python_version(),
        "machine": platform.machine(),
        **fields,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
