"""Reading YAML into pydantic models, with errors that name the file, the key, and the nearest key of the same level."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo

from sglang_probe.errors import ConfigError
from sglang_probe.yaml_text import read_yaml

UNKNOWN_KEY, MISSING_KEY, BAD_VALUE = "unknown key", "missing key", "bad value"
"""Why data is no `Config`: `ProbeError.reason` of what `parse_config` raises."""

_log = logging.getLogger(__name__)


class Config(BaseModel):
    """Base of all configuration: unknown keys are errors, values never change after loading."""

    # The docstrings of fields are their descriptions in the JSON schema that `--schema` prints.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    hints: ClassVar[Mapping[str, str]] = {}
    """Of keys that people write and that are none here: what to write instead."""


M = TypeVar("M", bound=Config)


def load_config(path: Path | str, model: type[M]) -> M:
    """Read a YAML file as `model`. Relative paths of inputs in it (`InputPath`) are relative to the file.

    Raises:
        ConfigError: no such file, not YAML, unknown key (the nearest known one is suggested), or a wrong value.
    """
    path = Path(path)
    return parse_config(read_yaml(path), model, where=str(path), folder=path.parent)


def parse_config(data: dict[str, Any], model: type[M], *, where: str, folder: Path | None = None) -> M:
    """Validate `data` as `model`.

    Args:
        where: names its origin in error messages.
        folder: what relative paths of inputs are relative to; None: the working directory.

    Raises:
        ConfigError: `reason` is `UNKNOWN_KEY`, `MISSING_KEY` or `BAD_VALUE`.
    """
    try:
        return model.model_validate(data, context=None if folder is None else {"folder": folder})
    except ValidationError as e:
        kinds = {found["type"] for found in e.errors(include_url=False, include_context=False, include_input=False)}
        reason = UNKNOWN_KEY if "extra_forbidden" in kinds else MISSING_KEY if kinds == {"missing"} else BAD_VALUE
        raise ConfigError(_explain(e, model, where), reason=reason) from None


def beside(path: str, folder: Path | None) -> str:
    """A path of an input that a YAML file in `folder` names: relative to the file, else to the working directory."""
    given = os.path.expanduser(path)
    if folder is None or os.path.isabs(given):
        return given
    near = os.path.normpath(folder / given)
    if os.path.exists(near) or not os.path.exists(given):
        return near
    _log.warning("%s is taken from the working directory: there is no %s", given, near)
    return given


def _input_path(path: Path, info: ValidationInfo) -> Path:
    return Path(beside(str(path), (info.context or {}).get("folder")))


InputPath = Annotated[Path, AfterValidator(_input_path)]
"""A file or folder that is read. In a YAML file it is relative to that file; if it is not there, to the working
directory, which is said."""


def _corpus(name: str, info: ValidationInfo) -> str:
    return name if name == "stdlib" else beside(name, (info.context or {}).get("folder"))


CorpusPath = Annotated[str, AfterValidator(_corpus)]
"""`stdlib`, or as `InputPath`."""


def _folder_name(name: str) -> str:
    if not name or name != os.path.basename(name) or name.startswith((".", "~")) or "\0" in name or len(name) > 100:
        raise ValueError(f"{name!r} becomes a folder: give a name without slashes that does not begin with a dot")
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]
"""A name that a folder gets."""


def nearest(key: str, known: Iterable[str], hints: Mapping[str, str] | None = None, *, what: str = "known keys") -> str:
    """What to say of an unknown key, to follow its name: a hint, the nearest known key, or all of them."""
    if hints and key in hints:
        return f": {hints[key]}"
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    return f"; did you mean `{near[0]}`?" if near else f"; {what}: {', '.join(known) or 'none'}"


def _explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    lines = []
    for e in error.errors():
        key = ".".join(str(p) for p in e["loc"])
        if e["type"] == "extra_forbidden":
            level = _level(model, e["loc"][:-1])
            known = {f.alias or name for m in level for name, f in m.model_fields.items()}
            hints = {k: text for m in level for k, text in getattr(m, "hints", {}).items()}
            lines.append(f"{where}: unknown key `{key}`{nearest(str(e['loc'][-1]), known, hints)}")
        elif e["type"] == "missing":
            lines.append(f"{where}: `{key}` is required")
        elif e["type"] == "union_tag_invalid":
            told = e["ctx"]
            name, tag = (str(told[k]).strip("'") for k in ("discriminator", "tag"))
            known = {kind.strip(" '") for kind in told["expected_tags"].split(",")}
            lines.append(f"{where}: `{key}`: unknown {name} `{tag}`{nearest(tag, known, what='known')}")
        else:
            # What a check of several keys got is the whole mapping: the reader has that before them.
            got = "" if isinstance(e["input"], dict) and e["type"] == "value_error" else f" (got {e['input']!r})"
            if isinstance(e["input"], bool) and e["type"] in ("literal_error", "string_type"):
                got += "; YAML reads an unquoted on, off, yes, no, true or false as a boolean: quote it"
            elif isinstance(e["input"], int | float) and e["type"] == "string_type":
                got += "; quote it, if it comes from YAML"
            named = f"{where}: `{key}`: " if key else f"{where}: "
            lines.append(named + e["msg"].removeprefix("Value error, ").replace("valid tuple", "list") + got)
    return "\n".join(lines)


def _level(model: type[BaseModel], path: Iterable[int | str]) -> list[type[BaseModel]]:
    """The models that what stands at `path` may be, `path` as pydantic tells it: fields, indices, and of a union the
    tag or the class that was tried."""
    found: list[Any] = [model]
    for part in path:
        inner: list[Any] = []
        for kind in _alternatives(found):
            if not _is_model(kind):
                inner += get_args(kind)
                continue
            fields = {f.alias or name: f for name, f in kind.model_fields.items()}
            if part in fields:
                inner.append(fields[part].annotation)
            elif part == kind.__name__ or any(part in get_args(f.annotation) for f in fields.values()):
                inner.append(kind)
        found = inner or found
    return [kind for kind in _alternatives(found) if _is_model(kind)] or [model]


def _alternatives(kinds: Iterable[Any]) -> list[Any]:
    """Members of unions and what `Annotated` holds; everything else as it is."""
    found: list[Any] = []
    for kind in kinds:
        if _is_model(kind) or getattr(kind, "__origin__", None) in (list, tuple, dict, set, frozenset):
            found.append(kind)
        elif hasattr(kind, "__metadata__"):
            found += _alternatives([kind.__origin__])
        else:
            found += _alternatives(get_args(kind))
    return found


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
