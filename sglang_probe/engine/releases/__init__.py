"""The SGLang releases that were reviewed, and what differs between them.

`release()` chooses once, by the installed version. Everything that is not the same in all of them is asked of it;
nothing else looks at the version. `docs/evidence/releases.md` says what the differences mean for the ledger.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

from sglang_probe.engine.releases import drift
from sglang_probe.engine.releases.base import Hook, Release
from sglang_probe.errors import InventoryError

__all__ = ["MODULES", "Hook", "Release", "release"]

MODULES = {
    "0.5.17": "release_0_5_17",
    "0.5.21": "release_0_5_21",
    "0.5.22": "release_0_5_22",
    "0.5.23": "release_0_5_23",
}
"""File of each reviewed release; its class is `Adapter`. Each has an inventory in `patches/`."""


@functools.cache
def release() -> Release:
    """The adapter of the installed SGLang.

    Raises:
        InventoryError: SGLang is not installed, or its version was not reviewed.
    """
    reviewed = ", ".join(MODULES)
    try:
        version = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise InventoryError(
            "SGLang is not installed in this environment", fix=f"install one of these releases: {reviewed}"
        ) from None
    adapter = drift.serving(version) or version
    if adapter not in MODULES:
        raise InventoryError(
            f"SGLang {version} is installed, but the probe has been reviewed only for {reviewed}",
            fix="install one of these, or try this one with `sglang-probe prove --accept-drift`",
        )
    return load(adapter)


def load(version: str) -> Release:
    """The adapter of a reviewed release; imports nothing of SGLang."""
    adapter: Release = importlib.import_module(f"sglang_probe.engine.releases.{MODULES[version]}").Adapter()
    return adapter
