"""The patch inventory: which places in SGLang the probe touches or relies on, and whether they are as reviewed.

`patches/sglang-<version>.yaml` lists every target with a fingerprint of its source. The fingerprint hashes the
syntax tree without docstrings, comments and formatting, and is taken from the source file, so checking one costs no
import of SGLang.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from sglang_probe.config import Config, parse_config
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
        "platform",
    ]
    why: str
    fingerprint: str


class Inventory(Config):
    """All targets of one SGLang release."""

    sglang: str
    version: int
    targets: list[Target]


@dataclass(frozen=True)
class Finding:
    """The state of one target in the installed SGLang."""

    target: Target
    state: Literal["fine", "changed", "missing"]
    found: str | None


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


def nearest_inventory(version: str) -> Inventory:
    """The inventory of `version`, or of the newest reviewed release."""
    return load_inventory(version if version in known_versions() else known_versions()[-1])


def load_inventory(version: str | None = None) -> Inventory:
    """The inventory of a release, by default of the installed one.

    Raises:
        InventoryError: there is none for that release; both sides are named.
    """
    version = version or installed_version()
    path = shipped("patches") / f"sglang-{version}.yaml"
    if not path.exists():
        raise InventoryError(
            f"SGLang {version} is installed, but the probe has been reviewed only for {', '.join(known_versions())}",
            fix="install one of these, or draft an inventory with `sglang-probe doctor --write` and review it",
        )
    return parse_config(yaml.safe_load(path.read_text()), Inventory, where=str(path))


def examine(inventory: Inventory, features: Iterable[str] | None = None) -> Iterator[Finding]:
    """Compare targets with the installed source; `features` limits which."""
    wanted = None if features is None else set(features)
    for target in inventory.targets:
        if wanted is not None and target.feature not in wanted:
            continue
        found = fingerprint(target.target)
        state: Literal["fine", "changed", "missing"] = (
            "missing" if found is None else "fine" if found == target.fingerprint else "changed"
        )
        yield Finding(target, state, found)


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
            fix="reinstall the stock release, or review the change and update patches/ (`sglang-probe doctor --write`)",
        )
    return inventory


def digest(inventory: Inventory) -> str:
    """SHA-256 of an inventory: what a certificate says was reviewed."""
    return hashlib.sha256(inventory.model_dump_json().encode()).hexdigest()


def fingerprint(dotted: str) -> str | None:
    """First 16 hex digits of the SHA-256 of a target's normalised syntax tree; None if it does not exist."""
    file, inside = _locate(dotted)
    if file is None:
        return None
    node: ast.AST | None = _parse(file)
    for name in inside:
        node = next(
            (
                child
                for child in getattr(node, "body", [])
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and child.name == name
            ),
            None,
        )
        if node is None:
            return None
    return hashlib.sha256(_normalised(node).encode()).hexdigest()[:16]


def draft(folder: Path, version: str) -> Path:
    """Write `sglang-<version>.draft.yaml`: the targets of the newest inventory with the installed fingerprints."""
    newest = nearest_inventory(version)
    targets = [t.model_copy(update={"fingerprint": fingerprint(t.target) or "missing"}) for t in newest.targets]
    data = Inventory(sglang=version, version=newest.version, targets=targets).model_dump()
    path = folder / f"sglang-{version}.draft.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False, width=1000), encoding="utf-8")
    return path


@functools.cache
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _locate(dotted: str) -> tuple[Path | None, list[str]]:
    """Split a dotted path into the module's file and the names inside it, without importing anything."""
    parts = dotted.split(".")
    spec = importlib.util.find_spec(parts[0])
    if spec is None or not spec.submodule_search_locations:
        return None, []
    here = Path(spec.submodule_search_locations[0])
    for i, part in enumerate(parts[1:], start=1):
        if (here / part).is_dir():
            here = here / part
        elif (here / f"{part}.py").is_file():
            return here / f"{part}.py", parts[i + 1 :]
        else:
            return None, []
    return here / "__init__.py", []


def _normalised(node: object) -> str:
    """A dump of a syntax tree that does not depend on formatting, docstrings or the Python minor version.

    `ast.dump` prints fields that newer Pythons add, so empty fields are left out here.
    """
    if isinstance(node, ast.AST):
        fields = []
        for name, value in ast.iter_fields(node):
            if name in ("ctx", "type_comment", "kind") or value is None or value == []:
                continue
            if name == "body" and isinstance(value, list) and _is_docstring(value[0]):
                value = value[1:]
            fields.append(f"{name}={_normalised(value)}")
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return "[" + ",".join(_normalised(x) for x in node) + "]"
    return repr(node)


def _is_docstring(statement: object) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
