"""Fingerprints of places in SGLang's source: of a function or class, or of the statements in it that are relied on.

Taken from source text, so that nothing of SGLang is imported, and a release that is not installed can be asked too: the
source is what is installed, or a wheel. What is hashed is the syntax tree without docstrings, comments and formatting.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import zipfile
from collections.abc import Sequence
from email.parser import HeaderParser
from pathlib import Path
from typing import Protocol

from sglang_probe.errors import InventoryError

_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
"""Fields of a syntax tree that hold statements, or what holds them."""


class Source(Protocol):
    """Where the source of a package is."""

    def __hash__(self) -> int: ...

    def text(self, module: tuple[str, ...]) -> str | None:
        """Source of a module or of a package's `__init__`, by its dotted name; None: there is none."""


class Installed:
    """What is importable here; nothing is imported for it."""

    def text(self, module: tuple[str, ...]) -> str | None:
        spec = importlib.util.find_spec(module[0])
        if spec is None or not spec.submodule_search_locations:
            return None
        at = Path(spec.submodule_search_locations[0]).joinpath(*module[1:])
        for file in (at / "__init__.py", at.with_suffix(".py")):
            if file.is_file():
                return file.read_text(encoding="utf-8")
        return None


class Wheel:
    """A wheel that need not be installed.

    Raises:
        InventoryError: the file is no wheel of SGLang.
    """

    def __init__(self, file: Path) -> None:
        how = "`pip download sglang==VERSION --no-deps` gets one"
        try:
            self._zip = zipfile.ZipFile(file)
        except (OSError, zipfile.BadZipFile) as e:
            raise InventoryError(f"{file} cannot be read as a wheel: {e}", fix=how) from None
        self._names = frozenset(self._zip.namelist())
        metadata = next((n for n in self._names if n.endswith(".dist-info/METADATA") and n.count("/") == 1), None)
        if metadata is None:
            raise InventoryError(f"{file} is no wheel: it has no METADATA", fix=how)
        told = HeaderParser().parsestr(self._zip.read(metadata).decode("utf-8", "replace"))
        if str(told["Name"]).lower() != "sglang":
            raise InventoryError(f"{file} is a wheel of {told['Name']}, not of sglang", fix=how)
        self.version = str(told["Version"])

    def text(self, module: tuple[str, ...]) -> str | None:
        at = "/".join(module)
        for name in (f"{at}/__init__.py", f"{at}.py"):
            if name in self._names:
                return self._zip.read(name).decode("utf-8")
        return None


INSTALLED = Installed()


def fingerprint(dotted: str, relies_on: Sequence[str] | None = None, source: Source = INSTALLED) -> str | None:
    """First 16 hex digits of the SHA-256 of a target's normalised syntax tree.

    Args:
        dotted: path of a function, method or class.
        relies_on: names; then only the parameters are taken and the statements that mention one of these, with what
            they stand in (`if`, `for`, a nested function). Of a call with keywords, those that mention none are left
            out if others do; a function or a class of such a name is taken whole. None: the whole target.

    Returns:
        None if the target does not exist, or mentions one of the names nowhere.
    """
    return _fingerprint(dotted, None if relies_on is None else tuple(relies_on), source)


@functools.lru_cache(maxsize=1024)
def _fingerprint(dotted: str, relies_on: tuple[str, ...] | None, source: Source) -> str | None:
    """Once for a process, as its source is read once (`_parsed`), and what it has imported stays as it was."""
    node = find(dotted, source)
    if node is None or absent(node, relies_on or ()):
        return None
    whole = _normalised(node) if relies_on is None else _slice(node, frozenset(relies_on))
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def find(dotted: str, source: Source = INSTALLED) -> ast.AST | None:
    """The syntax tree of a function, method or class; None: it does not exist."""
    parts = tuple(dotted.split("."))
    for n in range(len(parts) - 1, 0, -1):
        tree = _parsed(source, parts[:n])
        if tree is not None:
            return _inside(tree, parts[n:])
    return None


def absent(node: ast.AST, names: Sequence[str]) -> list[str]:
    """Those of `names` that a syntax tree mentions nowhere."""
    mentioned = {name for n in ast.walk(node) for name in _names(n)}
    return [name for name in names if name not in mentioned]


@functools.lru_cache(maxsize=1024)
def _parsed(source: Source, module: tuple[str, ...]) -> ast.Module | None:
    text = source.text(module)
    return None if text is None else ast.parse(text)


def _inside(tree: ast.AST, names: Sequence[str]) -> ast.AST | None:
    for name in names:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = (child for child in getattr(tree, "body", ()) if isinstance(child, kinds) and child.name == name)
        child = next(found, None)
        if child is None:
            return None
        tree = child
    return tree


def _names(node: ast.AST) -> tuple[str, ...]:
    """What one node of a tree mentions, its children not asked; `return` and `raise` are names too."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
            return (name,)
        case ast.keyword(arg=str(name)) | ast.alias(name=name):
            return (name,)
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return (name,)
        case ast.Return():
            return ("return",)
        case ast.Raise():
            return ("raise",)
    return ()


def _slice(node: ast.AST, names: frozenset[str]) -> str:
    """The parameters of a function, or the bases of a class, and what in it mentions one of `names`."""
    if isinstance(node, ast.ClassDef):
        head = _normalised(node.bases)
    else:
        told: ast.arguments = node.args  # type: ignore[attr-defined]
        every = [*told.posonlyargs, *told.args, told.vararg, *told.kwonlyargs, told.kwarg]
        head = ",".join(a.arg if a is not None else "-" for a in every)
        head += _normalised(told.defaults) + _normalised([d for d in told.kw_defaults if d is not None])
    return f"{type(node).__name__}({head})" + "".join(_kept(s, names) for s in node.body)  # type: ignore[attr-defined]


def _kept(node: ast.AST, names: frozenset[str]) -> str:
    """A statement if it mentions a name, without what it holds that does not; else nothing."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name in names:
        return _normalised(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
    blocks = {name: fields.pop(name) for name in _BLOCKS if isinstance(fields.get(name), list)}
    inner = {name: "".join(_kept(child, names) for child in block) for name, block in blocks.items()}
    head = any(_mentions(part, names) for part in fields.values()) or bool(names.intersection(_names(node)))
    if not head and not any(inner.values()):
        return ""
    own = ",".join(f"{name}={_normalised(value, names)}" for name, value in fields.items() if name not in _UNSAID)
    return f"{type(node).__name__}({own}){{{'|'.join(f'{n}:{text}' for n, text in inner.items())}}}"


def _mentions(part: object, names: frozenset[str]) -> bool:
    if isinstance(part, list):
        return any(_mentions(p, names) for p in part)
    return isinstance(part, ast.AST) and any(names.intersection(_names(n)) for n in ast.walk(part))


_UNSAID = ("ctx", "type_comment", "kind")
"""Fields that say nothing, or what newer Pythons alone know."""


def _normalised(node: object, names: frozenset[str] | None = None) -> str:
    """A dump of a syntax tree that does not depend on formatting, docstrings or the Python minor version.

    `ast.dump` prints fields that newer Pythons add, so empty fields are left out here.

    Args:
        names: of a call, keywords that mention none of these are left out if another one does.
    """
    if isinstance(node, ast.AST):
        fields = []
        for name, value in ast.iter_fields(node):
            if name in _UNSAID or value is None or value == []:
                continue
            if name == "body" and isinstance(value, list) and _is_docstring(value[0]):
                value = value[1:]
            if names and name == "keywords":
                value = [k for k in value if _mentions(k, names)] or value
            fields.append(f"{name}={_normalised(value, names)}")
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return "[" + ",".join(_normalised(x, names) for x in node) + "]"
    return repr(node)


def _is_docstring(statement: object) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
