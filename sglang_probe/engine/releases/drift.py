"""A release that nobody reviewed, taken as one that was: accepted by a proof on this machine, or on trial in one.

`sglang-probe prove --accept-drift` (`prove/drift.py`) writes the file. It holds for this installation: it lists every
place as it was found, and a place that has changed since is refused like a changed place of a reviewed release. It
holds for this inventory too: a probe whose own list of places is another one asks for another proof.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from sglang_probe.paths import cache_dir, shipped

TRIAL = "SGLANG_PROBE_DRIFT_ON_TRIAL"
"""Names the file of a drift that is being proved, in the processes of that proof."""
FOLDER = "drift"


def default_path(version: str) -> Path:
    """Where what was accepted of a release lies."""
    return cache_dir() / FOLDER / f"sglang-{version}.json"


def digest(reviewed: str) -> str | None:
    """SHA-256 of the inventory of a reviewed release; None: there is none."""
    path = shipped("patches") / f"sglang-{reviewed}.yaml"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def accepted(version: str) -> dict[str, Any] | None:
    """What was accepted of this release: `sglang`, `as` (the reviewed release whose adapter serves it), `inventory`,
    `left_out` (features), `of` (`digest` of the inventory that it was compared with) and `certificate`; None: nothing,
    what cannot be read, or what was compared with another inventory."""
    path = Path(os.environ.get(TRIAL) or default_path(version))
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(told, dict) or told.get("sglang") != version:
        return None
    return told if told.get("of") == digest(str(told.get("as"))) else None


def serving(version: str) -> str | None:
    """The reviewed release whose adapter serves this one, if its drift was accepted."""
    told = accepted(version)
    return None if told is None else str(told["as"])
