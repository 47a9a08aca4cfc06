"""The pages of `docs/reference/` that follow from the code: `make docs` writes them, a test compares them.

python docs/generate.py            # writes the pages
"""

from __future__ import annotations

import enum
import inspect
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import typer.main
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from sglang_probe.ask import Ask
from sglang_probe.cli import app
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.live.config import LiveConfig
from sglang_probe.harvest.config import HarvestConfig, Recording
from sglang_probe.policy.arm import Arm
from sglang_probe.report import markdown
from sglang_probe.run import schema
from sglang_probe.studies.base import RecordedStudy
from sglang_probe.studies.catalogue import STUDIES
from sglang_probe.studies.sae_train.config import SaeTrainConfig

FOLDER = Path(__file__).parent
DO_NOT_EDIT = "Written by `make docs`; do not edit."
EXIT_CODES = (
    "Exit codes: 0, all is well; 1, the command ran, and something that it checked does not hold; 2, an error, with a "
    "sentence that says what to do; 128 and the number of the signal after one (130 after Ctrl-C, 143 after SIGTERM)."
)
TABLES = {
    "spans": schema.SPANS,
    "forwards": schema.FORWARDS,
    "rebinds": schema.REBINDS,
    "tree": schema.TREE,
    "interventions": schema.INTERVENTIONS,
    "gates": schema.GATES,
    "budget": schema.BUDGET,
    "monitored": schema.MONITORED,
    "withheld": schema.WITHHELD,
    "requests": schema.LIVE_REQUESTS,
    "telemetry": schema.TELEMETRY,
}
"""Tables whose columns the page on the run directory lists; what each means is in `columns.yaml`."""


def pages() -> dict[str, str]:
    """Every generated page by its path below `docs/`."""
    return {
        "reference/configuration.md": configuration(),
        "reference/commands.md": commands(),
        "reference/run-directory.md": run_directory(),
    }


def configuration() -> str:
    """Every key of every YAML."""
    studies: dict[str, type[BaseModel]] = {s.name: s.config() for s in STUDIES if isinstance(s, RecordedStudy)}
    studies["sae train"] = SaeTrainConfig
    sections: dict[str, type[BaseModel]] = {}
    parts = [_lead(["harvest", *studies]), "## What every recording may say", _table(Recording, sections)]
    parts += ["## `sglang-probe harvest`", _about(HarvestConfig), _table(HarvestConfig, sections, without=Recording)]
    for model in dict.fromkeys(studies.values()):
        sharing = [f"`sglang-probe {n}`" for n, m in studies.items() if m is model]
        parts += [f"## {' and '.join(sharing)}", _about(model), _table(model, sections, without=Recording)]
    parts += ["## A live server: the YAML that `SGLANG_PROBE` names", _about(EngineProbeConfig)]
    parts += [_table(EngineProbeConfig, sections), "## What a request may ask", _about(Ask, first=True)]
    parts += ["[More about each](asks.md).", _table(Ask, sections)]
    parts += ["## Mappings within these"]
    for model in (LiveConfig, Arm):
        sections[model.__name__] = model
    shown: set[str] = set()
    while left := [m for n, m in sections.items() if n not in shown]:
        model = left[0]
        shown.add(model.__name__)
        inherited = HarvestConfig if issubclass(model, HarvestConfig) else None
        parts += [f"### {model.__name__}", _about(model), _table(model, sections, without=inherited)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _lead(files: Iterable[str]) -> str:
    commands = ", ".join(f"`{name}`" for name in files)
    return (
        f"# Configuration\n\n{DO_NOT_EDIT}\n\nEvery key of every YAML that the commands {commands} and a live server "
        "read. An unknown key is an error that names the nearest known one.\n`sglang-probe <command> --example` prints "
        "a YAML to start from; `--schema` prints this page as a JSON schema, for editors that complete YAML.\n"
        "`sglang-probe live` has both for the YAML of a live server."
    )


def _about(model: type[BaseModel], *, first: bool = False) -> str:
    text = inspect.cleandoc(model.__doc__ or "")
    return text.split("\n\n")[0] if first else text


def _table(model: type[BaseModel], sections: dict[str, type[BaseModel]], without: type[BaseModel] | None = None) -> str:
    rows = []
    for name, field in model.model_fields.items():
        if without is not None and name in without.model_fields:
            inherited = without.model_fields[name]
            if field.annotation == inherited.annotation and _default(field) == _default(inherited):
                continue
        key = field.alias or name
        shown = " ".join((field.description or "").split())
        rows.append([f"`{key}`", _type(field.annotation, sections), _default(field), _cell(shown)])
    if not rows:
        return "No keys beyond those of every recording."
    return markdown.table(["key", "values", "default", "meaning"], rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined
    if value is PydanticUndefined:
        return "**required**"
    if value is None:
        return ""
    return f"`{_cell(_yaml(value))}`"


def _yaml(value: Any) -> str:
    def plain(v: Any) -> Any:
        if isinstance(v, BaseModel):
            return {k: plain(x) for k, x in v.model_dump(mode="json", exclude_defaults=True).items()}
        if isinstance(v, Mapping):
            return {k: plain(x) for k, x in v.items()}
        if isinstance(v, list | tuple | set | frozenset):
            return [plain(x) for x in (sorted(v) if isinstance(v, set | frozenset) else v)]
        return v.value if isinstance(v, enum.Enum) else v if isinstance(v, bool | int | float | str) else str(v)

    text: str = yaml.safe_dump(plain(value), default_flow_style=True, width=1000, sort_keys=False).strip()
    return text.removesuffix("\n...").strip()


_NAMES = {
    str: "text",
    int: "number",
    float: "number",
    bool: "true, false",
    Path: "path",
    Any: "anything",
    dict: "mapping",
}


def _type(kind: Any, sections: dict[str, type[BaseModel]]) -> str:
    """A type in words; models that occur are added to `sections`."""
    origin, given = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _type(given[0], sections)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(a, sections) for a in given if a is not type(None)))
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in given)
    if origin in (list, tuple, set, frozenset):
        return f"list of {_type(given[0], sections)}" if given else "list"
    if origin in (dict, Mapping):
        return f"mapping of names to {_type(given[1], sections)}"
    if inspect.isclass(kind) and issubclass(kind, BaseModel):
        sections.setdefault(kind.__name__, kind)
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    if inspect.isclass(kind) and issubclass(kind, enum.Enum):
        return ", ".join(f"`{member.value}`" for member in kind)
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)).lower())


def commands() -> str:
    """Every command, its arguments and options."""
    root = typer.main.get_command(app)
    parts = [f"# Commands\n\n{DO_NOT_EDIT}\n\n{EXIT_CODES}"]
    for path, command in _commands(root, ["sglang-probe"]):
        parts += [f"## `{' '.join(path)}`", inspect.cleandoc(command.help or "").replace("\f", ""), _options(command)]
    return "\n\n".join(parts) + "\n"


def _commands(command: Any, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    nested = getattr(command, "commands", None)
    if nested is None:
        yield path, command
    else:
        for name, child in nested.items():
            yield from _commands(child, [*path, name])


def _options(command: click.Command) -> str:
    rows = []
    for p in command.params:
        if p.name == "help":
            continue
        named = f"`{p.name.upper()}`" if p.param_type_name == "argument" else ", ".join(f"`{o}`" for o in p.opts)
        default = "" if p.default in (None, False, ()) or callable(p.default) else f"`{p.default}`"
        default = "**required**" if p.required else default
        rows.append([named, default, _cell(" ".join((getattr(p, "help", None) or "").split()))])
    return markdown.table(["argument or option", "default", "meaning"], rows)


def run_directory() -> str:
    """Files of a run directory, and every column of its tables."""
    told = yaml.safe_load((FOLDER / "columns.yaml").read_text(encoding="utf-8"))
    text = (FOLDER / "run-directory.template.md").read_text(encoding="utf-8")
    for name, table in TABLES.items():
        text = text.replace(f"<!-- {name} -->", columns(name, table, told[name]))
    return text.replace("<!-- written by -->", DO_NOT_EDIT)


def columns(name: str, table: pa.Schema, told: Mapping[str, str]) -> str:
    """One table.

    Raises:
        KeyError: a column has no description in `columns.yaml`, or a description no column.
    """
    if missing := set(table.names) ^ told.keys():
        raise KeyError(f"docs/columns.yaml: `{name}` and its schema differ in {', '.join(sorted(missing))}")
    rows = [[f"`{f.name}`", _short(f.type), _cell(" ".join(told[f.name].split()))] for f in table]
    return markdown.table(["column", "type", "meaning"], rows)


def _short(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {_short(kind.value_type)}"
    if pa.types.is_struct(kind):
        return "{" + ", ".join(kind.field(i).name for i in range(kind.num_fields)) + "}"
    return str(kind)


if __name__ == "__main__":
    for path, text in pages().items():
        (FOLDER / path).write_text(text, encoding="utf-8")
        print(f"docs/{path}")
