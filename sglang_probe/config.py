"""Reading YAML into pydantic models, with errors that name the file, the key, and the nearest known key."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from sglang_probe.errors import ConfigError


class Config(BaseModel):
    """Base of all configuration: unknown keys are errors, values never change after loading."""

    # The docstrings of fields are their descriptions in the JSON schema that `--schema` prints.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


M = TypeVar("M", bound=Config)


def load_config(path: Path | str, model: type[M]) -> M:
    """Read a YAML file as `model`.

    Raises:
        ConfigError: no such file, not YAML, unknown key (the nearest known one is suggested), or a wrong value.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}", fix="give the path of a YAML file") from e
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"{path} is not valid YAML: {e}") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {type(data).__name__}")
    return parse_config(data, model, where=str(path))


def parse_config(data: dict[str, Any], model: type[M], *, where: str) -> M:
    """Validate `data` as `model`; `where` names its origin in error messages."""
    try:
        return model.model_validate(data)
    except ValidationError as e:
        raise ConfigError(_explain(e, model, where)) from None


def _explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    lines = []
    for e in error.errors():
        key = ".".join(str(p) for p in e["loc"])
        if e["type"] == "extra_forbidden":
            known = _known_keys(model)
            near = difflib.get_close_matches(str(e["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"; did you mean `{near[0]}`?" if near else f"; known keys: {', '.join(sorted(known))}"
            lines.append(f"{where}: unknown key `{key}`{hint}")
        elif e["type"] == "missing":
            lines.append(f"{where}: `{key}` is required")
        else:
            # What a check of several keys got is the whole mapping: the reader has that before them.
            got = "" if isinstance(e["input"], dict) and e["type"] == "value_error" else f" (got {e['input']!r})"
            named = f"{where}: `{key}`: " if key else f"{where}: "
            lines.append(named + e["msg"].removeprefix("Value error, ").replace("valid tuple", "list") + got)
    return "\n".join(lines)


def _known_keys(model: type[BaseModel]) -> set[str]:
    """Field names of a model and of the models nested in it."""
    keys: set[str] = set()
    stack: list[Any] = [model]
    seen: set[Any] = set()
    while stack:
        m = stack.pop()
        if m in seen:
            continue
        seen.add(m)
        if isinstance(m, type) and issubclass(m, BaseModel):
            keys.update(m.model_fields)
            stack.extend(f.annotation for f in m.model_fields.values())
        else:
            stack.extend(getattr(m, "__args__", ()))
    return keys
