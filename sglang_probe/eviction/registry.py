"""Methods and oracles by name. Each file of `methods/` and `oracles/` registers the one class it defines."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sglang_probe.config import parse_config
from sglang_probe.errors import ConfigError
from sglang_probe.eviction.base import Method, Oracle, Policy

METHODS: dict[str, type[Method]] = {}
ORACLES: dict[str, type[Oracle]] = {}

P = TypeVar("P", bound=type[Policy])


def register(name: str, *, source: str) -> Callable[[P], P]:
    """Class decorator: make a method or an oracle known by `name`; `source` says where it is published."""

    def add(cls: P) -> P:
        table: dict[str, Any] = ORACLES if issubclass(cls, Oracle) else METHODS
        if name in METHODS or name in ORACLES:
            raise ValueError(f"`{name}` is registered twice")
        cls.name, cls.source = name, source
        table[name] = cls
        return cls

    return add


def parse_method(data: Mapping[str, Any] | str) -> Method:
    """A method from `{"method": name, parameter: value, ...}`, or from its name alone with default parameters.

    Raises:
        ConfigError: no such method (an oracle is not a method), or a wrong parameter.
    """
    return _parse(data, METHODS, "method")  # type: ignore[return-value]


def parse_oracle(data: Mapping[str, Any] | str) -> Oracle:
    """An oracle from `{"oracle": name, ...}` or its name.

    Raises:
        ConfigError: no such oracle, or a wrong parameter.
    """
    return _parse(data, ORACLES, "oracle")  # type: ignore[return-value]


def _parse(data: Mapping[str, Any] | str, table: Mapping[str, type[Policy]], kind: str) -> Policy:
    values: dict[str, Any] = {kind: data} if isinstance(data, str) else dict(data)
    name = values.pop(kind, None)
    if name not in table:
        near = difflib.get_close_matches(str(name), table, n=1, cutoff=0.5)
        fix = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(table)}"
        raise ConfigError(f"no {kind} `{name}`", fix=fix)
    return parse_config(values, table[name], where=f"{kind} {name}")
