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

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run import journal, schema
from sglang_probe.run.damage import FIX, reading

MANIFEST = "manifest.json"
_SECRET = re.compile(r"(^|_)(api_key|password|secret|access_token|auth_token|hf_token)|watermark_key")


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest in one step."""
    journal.write_text_durably(path / MANIFEST, manifest_text(manifest))


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """What a manifest's file holds."""
    return json.dumps(manifest, indent=2, default=str) + "\n"


class Manifest(dict[str, Any]):
    """A manifest as it was read. A key that is asked for and not there is damage, and said as that."""

    def __init__(self, fields: Mapping[str, Any], where: Path) -> None:
        super().__init__(fields)
        self._where = where

    def __missing__(self, key: str) -> Any:
        raise RunDirectoryError(f"{self._where} has no `{key}`", fix=FIX)


def read_manifest(file: Path) -> Manifest:
    """Read a manifest, and check the kinds of its values.

    Raises:
        RunDirectoryError: it cannot be read, or a value is of another kind than it is in every manifest.
    """
    with reading(file):
        found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise RunDirectoryError(f"{file} is damaged: it holds no mapping", fix=FIX)
    for key, kinds in _KINDS.items():
        value = found.get(key)
        if key in found and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise RunDirectoryError(f"{file} is damaged: `{key}` is {json.dumps(value)[:60]}", fix=FIX)
    manifest = Manifest(found, file)
    manifest["schema_version"]
    return manifest


_NOTHING = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    "schema_version": (int,),
    **dict.fromkeys(
        ("status", "created", "python", "machine", "name", "arm", "model_path", "dtype", "privacy"), (str,)
    ),
    "requests_expected": (int,),
    "rows": (int,),
    "hook_points": (dict, list),
    **dict.fromkeys(("files", "heads", "head_numbers", "model", "versions", "segment", "workload"), (dict,)),
    **dict.fromkeys(("positions_by_status", "positions_by_phase", "requests_by_finish"), (dict,)),
    **dict.fromkeys(("telemetry_layers", "starts", "sessions"), (list,)),
    **dict.fromkeys(
        ("rows_kept", "telemetry", "kept", "steer", "policy", "model_config", "switches"), (dict, _NOTHING)
    ),
    **dict.fromkeys(("server", "server_given", "server_resolved"), (dict, _NOTHING)),
    "cached_tokens_disagreements": (list, _NOTHING),
}
"""What a value may be, of keys that are read without a further look."""


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
