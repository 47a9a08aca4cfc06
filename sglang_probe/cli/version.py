"""`sglang-probe --version`."""

from __future__ import annotations

import platform
from importlib import metadata

_BESIDE = ("sglang", "torch", "transformers", "sae-lens")


def lines() -> list[str]:
    """Our version, and those of what it works with as far as that is installed. Imports none of it."""
    found = [f"sglang-probe {metadata.version('sglang-probe')}", f"python {platform.python_version()}"]
    for name in _BESIDE:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return found
