"""The patch inventory: which places in SGLang the probe touches or relies on, and whether they are as reviewed.

`patches/sglang-<version>.yaml` lists every target with a fingerprint of its source (`engine/hooks/fingerprint.py`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from sglang_probe.config import Config, parse_config
from sglang_probe.engine.hooks.fingerprint import INSTALLED, Source, absent, find, fingerprint
from sglang_probe.engine.releases import drift
from sglang_probe.errors import InventoryError
from sglang_probe.paths import shipped


class Target(Config):
    """One place in SGLang: a dotted path to a function, method or class."""

    target: str
    hook: Literal["around", "after", "before", "subclass", "relied on"]
    """How it is touched; `relied on` means not patched, but its behaviour is part of our argument."""
    feature: Literal[
        "accounting",
        "rows",
        "attention rows",
        "accelerator rows",
        "slot truth",
        "telemetry",
        "forced decoding",
        "bypass",
        "positions",
        "eviction",
        "steering",
        "control",
        "live",
        "traces",
        "platform",
    ]
    why: str
    relies_on: list[str] | None = None
    """Names: what is relied on is the parameters, and the statements that mention one of these. None: all of it."""
    fingerprint: str

    def found(self, source: Source = INSTALLED) -> str | None:
        """The fingerprint of what is there; None: it is missing, or one of the names is."""
        return fingerprint(self.target, self.relies_on, source)


class Inventory(Config):
    """All targets of one SGLang release."""

    sglang: str
    version: int
    targets: list[Target]


@dataclass(frozen=True)
class Finding:
    """The state of one target in a release of SGLang."""

    target: Target
    state: Literal["fine", "changed", "missing"]
    found: str | None
    absent: tuple[str, ...] = ()
    """Of a target that is there: names that it was relied on for, and mentions nowhere."""


def installed_version() -> str:
    """Version of the installed SGLang.

    Raises:
        InventoryError: SGLang is not installed.
    """
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        raise InventoryError(
            "SGLang is not installed in this environment",
            fix=f"pip install 'sglang-probe[engine]' (inventories exist for: {', '.join(known_versions())})",
        ) from None


def known_versions() -> list[str]:
    """SGLang releases that have an inventory."""
    names = [p.stem.removeprefix("sglang-") for p in shipped("patches").glob("sglang-*.yaml")]
    return sorted((n for n in names if not n.endswith(".draft")), key=_version_order)


def _version_order(version: str) -> tuple[tuple[int, str], ...]:
    """0.5.9 before 0.5.23: numbers by value."""
    parts = version.replace("post", ".post.").split(".")
    return tuple((int(p), "") if p.isdigit() else (-1, p) for p in parts if p)


def nearest_inventory(version: str, source: Source = INSTALLED) -> Inventory:
    """The inventory of `version`, or that of the reviewed release of which `source` has the most targets unchanged.

    Of equals, the newest.
    """
    if version in known_versions():
        return load_inventory(version)
    every = [load_inventory(known) for known in reversed(known_versions())]
    return max(every, key=lambda reviewed: sum(f.state == "fine" for f in examine(reviewed, source=source)))


def load_inventory(version: str | None = None) -> Inventory:
    """The inventory of a release, by default of the installed one: of one whose drift was accepted, what was found;
    but of a reviewed one that is as it was reviewed, what was reviewed.

    Raises:
        InventoryError: there is none for that release; both sides are named.
    """
    if version is None:
        version = installed_version()
        if (told := drift.accepted(version)) is not None:
            stock = load_inventory(version) if version in known_versions() else None
            if stock is None or any(f.state != "fine" for f in examine(stock)):
                return parse_config(told["inventory"], Inventory, where=f"accepted drift of SGLang {version}")
            return stock
    path = shipped("patches") / f"sglang-{version}.yaml"
    if not path.exists():
        raise InventoryError(
            f"SGLang {version} is installed, but the probe has been reviewed only for {', '.join(known_versions())}",
            fix="install one of these, or try this one with `sglang-probe prove --accept-drift`",
        )
    about = path.stat()
    return _read(path, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=16)
def _read(path: Path, _changed: int, _size: int) -> Inventory:
    """Read again if the file was changed: YAML of this length takes as long as comparing all targets."""
    return parse_config(yaml.safe_load(path.read_text()), Inventory, where=str(path))


def examine(
    inventory: Inventory, features: Iterable[str] | None = None, source: Source = INSTALLED
) -> Iterator[Finding]:
    """Compare targets with a source; `features` limits which."""
    wanted = None if features is None else set(features)
    for target in inventory.targets:
        if wanted is not None and target.feature not in wanted:
            continue
        found = target.found(source)
        node = find(target.target, source) if found is None else None
        gone = tuple(absent(node, target.relies_on or ())) if node is not None else ()
        state: Literal["fine", "changed", "missing"] = (
            "missing" if found is None else "fine" if found == target.fingerprint else "changed"
        )
        yield Finding(target, state, found, gone)


def require(features: Iterable[str]) -> Inventory:
    """Refuse unless every target of `features` is as reviewed.

    Raises:
        InventoryError: a target changed or is missing; it is named with both fingerprints. Or a feature was reviewed on
            other releases only.
    """
    inventory = load_inventory()
    features = list(features)
    if unknown := [f for f in features if f not in {t.feature for t in inventory.targets}]:
        others = [v for v in known_versions() if set(unknown) <= {t.feature for t in load_inventory(v).targets}]
        raise InventoryError(
            f"{', '.join(unknown)}: not reviewed on SGLang {inventory.sglang}",
            fix=f"install SGLang {' or '.join(others) or 'for which it was reviewed'}, or do without it",
        )
    bad = [f for f in examine(inventory, features) if f.state != "fine"]
    if bad:
        lines = [
            f"{f.target.target} ({f.target.feature}): {f.state}; "
            f"reviewed {f.target.fingerprint}, installed {f.found or 'nothing'}"
            for f in bad
        ]
        raise InventoryError(
            f"SGLang {inventory.sglang} differs from what was reviewed:\n  " + "\n  ".join(lines),
            fix="reinstall the stock release, or try what is installed with `sglang-probe prove --accept-drift`",
        )
    return inventory


def digest(inventory: Inventory) -> str:
    """SHA-256 of an inventory: what a certificate says was reviewed."""
    return hashlib.sha256(inventory.model_dump_json().encode()).hexdigest()


def draft(folder: Path, version: str, source: Source = INSTALLED) -> Path:
    """Write `sglang-<version>.draft.yaml`: the targets of the nearest inventory with the fingerprints of `source`."""
    near = nearest_inventory(version, source)
    targets = [t.model_copy(update={"fingerprint": t.found(source) or "missing"}) for t in near.targets]
    data = Inventory(sglang=version, version=near.version, targets=targets).model_dump(exclude_none=True)
    path = folder / f"sglang-{version}.draft.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False, width=1000), encoding="utf-8")
    return path
