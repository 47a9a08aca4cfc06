"""A release without an inventory, or one with changed places, tried under the adapter of the nearest reviewed one.

The proof decides. What it exercises may have changed; what it does not exercise is left out where anything changed: a
feature whose places are all as reviewed stays. A place that has to be patched and is gone cannot be tried.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_probe.engine.hooks import inventory
from sglang_probe.engine.hooks.inventory import Finding, Inventory, Target
from sglang_probe.engine.releases import drift, release
from sglang_probe.errors import ConfigError, InventoryError
from sglang_probe.prove.config import ProofConfig

EXERCISED = frozenset({"accounting", "bypass", "control", "platform", "rows", "attention rows"})
"""Features that a proof makes use of, if it reuses prefixes and captures its own rows (`refuse_less`); on an
accelerator `_ON_AN_ACCELERATOR` too."""
_ON_AN_ACCELERATOR = frozenset({"accelerator rows"})
_NEEDED = ("accounting", "control")
"""What every proof needs."""
_ASKED_OF = {
    "reference": ("rows", "attention rows"),
    "invariants": ("rows", "accounting"),
    "graphs": ("accelerator rows",),
}
"""Features that a check is of, by the first word of its name; any other is of the accounting."""


@dataclass
class Trial:
    """A drift that is being proved."""

    path: Path
    """The file while it is on trial."""
    told: dict[str, Any]
    drifted: list[Finding]

    def accept(self, certificate: str) -> Path:
        """The proof holds: later recordings of this installation may rely on it."""
        os.environ.pop(drift.TRIAL, None)
        path = drift.default_path(self.told["sglang"])
        self.path.write_text(json.dumps(self.told | {"certificate": certificate}, indent=2) + "\n", encoding="utf-8")
        self.path.replace(path)
        release.cache_clear()
        return path

    def drop(self) -> None:
        """It does not."""
        os.environ.pop(drift.TRIAL, None)
        self.path.unlink(missing_ok=True)
        release.cache_clear()

    def suspects(self, check: str) -> list[str]:
        """Places that changed among those which a check relies on, in words."""
        features = _ASKED_OF.get(check.partition(",")[0], ("accounting", "control", "bypass", "platform"))
        return [said(f) for f in self.drifted if f.target.feature in features]


def refuse_less(config: ProofConfig) -> None:
    """Refuse a proof that shows less than what would be accepted: acceptance is of a release, whatever is served.

    Raises:
        ConfigError: it names the key.
    """
    if config.server.get("disable_radix_cache"):
        raise ConfigError(
            "`--accept-drift` with `disable_radix_cache`: nothing would be reused, and places of the prefix cache that "
            "changed would be accepted unseen",
            fix="prove with the cache on; the acceptance holds without it too",
        )
    if config.hook_points:
        raise ConfigError(
            "`--accept-drift` with `--hook-point`: places of rows that are not captured would be accepted unseen",
            fix="leave `--hook-point` out; prove those rows afterwards",
        )


def begin(*, accelerator: bool) -> Trial | None:
    """Put the installed release on trial, for this process and those that it starts.

    Args:
        accelerator: whether the proof runs on one.

    Returns:
        None if the release was reviewed and nothing changed: there is no drift.

    Raises:
        InventoryError: a place that has to be patched for any recording is gone.
    """
    version = inventory.installed_version()
    drift.default_path(version).unlink(missing_ok=True)
    near = inventory.nearest_inventory(version)
    findings = list(inventory.examine(near))
    drifted = [f for f in findings if f.state != "fine"]
    if near.sglang == version and not drifted:
        return None
    told = _told(version, near, findings, EXERCISED | (_ON_AN_ACCELERATOR if accelerator else frozenset()))
    path = drift.default_path(version).with_suffix(f".trial-{os.getpid()}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told), encoding="utf-8")
    os.environ[drift.TRIAL] = str(path.resolve())
    release.cache_clear()
    return Trial(path, told, drifted)


def said(finding: Finding) -> str:
    """A place and what became of it."""
    state = f"mentions no {', '.join(finding.absent)}" if finding.absent else finding.state
    return f"{finding.target.target} ({finding.target.feature}): {state}"


def _told(version: str, near: Inventory, findings: list[Finding], exercised: frozenset[str]) -> dict[str, Any]:
    left_out: dict[str, str] = {}
    for f in findings:
        gone = _gone(f)
        if gone and f.target.feature in _NEEDED:
            own = "this release needs an adapter of its own (docs/evidence/releases.md); install "
            raise InventoryError(
                f"SGLang {version} cannot be tried under the adapter of {near.sglang}: what every recording patches is "
                f"gone: {', '.join(g.target.target for g in findings if _gone(g) and g.target.feature in _NEEDED)}",
                fix="reinstall the stock release: it was reviewed, and what is installed is no longer what it was"
                if near.sglang == version
                else own + " or ".join(inventory.known_versions()),
            )
        if gone or (f.state != "fine" and f.target.feature not in exercised):
            left_out.setdefault(f.target.feature, said(f))
    kept = [_as_found(f) for f in findings if f.target.feature not in left_out and (f.found or f.absent)]
    reviewed = Inventory(sglang=version, version=near.version, targets=kept).model_dump(exclude_none=True)
    told = {"sglang": version, "as": near.sglang, "of": drift.digest(near.sglang)}
    return told | {"inventory": reviewed, "left_out": left_out}


def _as_found(finding: Finding) -> Target:
    """The place as it is here; of one that no longer mentions what was relied on, all of it."""
    if finding.absent:
        whole = finding.target.model_copy(update={"relies_on": None})
        return whole.model_copy(update={"fingerprint": whole.found()})
    return finding.target.model_copy(update={"fingerprint": finding.found})


def _gone(finding: Finding) -> bool:
    """Whether a place that has to be patched is not there."""
    return finding.found is None and not finding.absent and finding.target.hook != "relied on"
