"""YAML as its readers expect it: numbers of YAML 1.2, keys as they are written, and no key twice.

PyYAML reads YAML 1.1, where `1e-3` is a string, `1:30` is ninety, `010` is eight and a date is no text. Here these are
what YAML 1.2 makes of them. Unquoted `on`, `off`, `yes` and `no` stay booleans, as server arguments need them; as a key
each of them (and `64:`, `null:`) is the text that is written there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sglang_probe.errors import ConfigError

_STRING = "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers; no dates."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in found if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            key.tag = _STRING
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key.value}` is there twice", key.start_mark
                )
            seen[key.value] = key.start_mark
        return super().construct_mapping(node, deep)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(node.value).replace("_", "")
    return int(text, 0 if re.match(r"[-+]?0[xo]", text) else 10)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9][0-9_]*$|0o[0-7]+$|0x[0-9a-fA-F]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _number)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: it cannot be read, is no text or no YAML, has a key twice, or is no mapping.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}", fix="give the path of a YAML file") from e
    try:
        found = yaml.load(data, Loader=_Loader)  # takes UTF-8, and UTF-16 with its mark
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not valid YAML: {e}") from e
    if found is None:
        raise ConfigError(f"{path} is empty: expected a mapping of keys to values")
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {type(found).__name__}")
    return found
