"""The manifest of a run directory: what every one has, and replacing it."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sglang_probe.run import journal, schema

MANIFEST = "manifest.json"
_SECRET = re.compile(r"(^|_)(api_key|password|secret|access_token|auth_token|hf_token)|watermark_key")


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


def without_secrets(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Server arguments as a manifest may hold them: keys and passwords are told to be there, and not what they are."""
    return {k: "(secret)" if v is not None and _SECRET.search(k) else v for k, v in arguments.items()}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
