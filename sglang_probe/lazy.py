"""Names at the door of a package that are imported when they are used, so that the door itself loads nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazily(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__`.

    Args:
        names: public name to `module` or `module:name` where it is called otherwise there; modules as below `package`.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, there = names[name].partition(":")
        return getattr(importlib.import_module(f"{package}.{module}"), there or name)

    return get
