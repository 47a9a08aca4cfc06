"""Where the files that ship with the package lie: beside it in a checkout, inside it in an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
BUILT_IN_MODEL = "probe-text"
"""The model of a run that names none."""
BUILT_IN_MODELS = (BUILT_IN_MODEL, "probe-recall", "probe-recall-1")


def shipped(relative: str) -> Path:
    """Path of a shipped file or folder, e.g. `patches` or `models/probe-text/checkpoint`."""
    inside = _PACKAGE / "_shipped" / relative
    return inside if inside.exists() else _PACKAGE.parent / relative


def cache_dir() -> Path:
    """Folder for what can be made again: `SGLANG_PROBE_CACHE`, else `~/.cache/sglang-probe`."""
    import os

    return Path(os.environ.get("SGLANG_PROBE_CACHE") or Path.home() / ".cache" / "sglang-probe")
