"""Real text to build prompts from: Python source found on any machine, or files of the user's own.

A corpus is an ordered list of documents with a digest, so that a run can record exactly which text its prompts
were drawn from. The built-in corpus `stdlib` is the standard library of the running interpreter: real prose
(docstrings) and real code, present wherever Python is, nothing to download.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sglang_probe.errors import WorkloadError

# Tests, generated tables and third-party trees are left out: they repeat, and would dominate by bytes.
_EXCLUDED_PARTS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
    "encodings",
}
_EXCLUDED_NAMES = {"pydoc_data", "topics.py"}
_TEXT_SUFFIXES = {".py", ".txt", ".md", ".rst"}


@dataclass(frozen=True)
class Document:
    """One text file of a corpus. `path` is relative to the corpus root, with forward slashes."""

    path: str
    text: str

    @property
    def module(self) -> str:
        """The dotted module name for a Python file, else the path."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass(frozen=True)
class Function:
    """A documented function: what few-shot exemplars and questions are made of."""

    module: str
    name: str
    signature: str
    doc: str
    source: str


@dataclass(frozen=True)
class Corpus:
    """Documents in path order. `digest` is the SHA-256 of all paths and texts."""

    name: str
    documents: tuple[Document, ...]

    @cached_property
    def digest(self) -> str:
        h = hashlib.sha256()
        for d in self.documents:
            h.update(d.path.encode(errors="surrogateescape") + b"\0" + d.text.encode() + b"\0")
        return h.hexdigest()

    @cached_property
    def functions(self) -> tuple[Function, ...]:
        """Every documented function of moderate length, in corpus order."""
        return tuple(f for d in self.documents if d.path.endswith(".py") for f in _functions_of(d))


def load_corpus(spec: str = "stdlib") -> Corpus:
    """Load a corpus: `stdlib`, or a file or folder of `.py`, `.txt`, `.md` and `.rst` files.

    Raises:
        WorkloadError: the path does not exist or holds no text.
    """
    if spec == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return Corpus("stdlib", _read_tree(root, {".py"}))
    root = Path(spec).expanduser()
    if not root.exists():
        raise WorkloadError(f"corpus not found: {spec}", fix="give `stdlib`, or the path of a text file or a folder")
    if root.is_file():
        documents: tuple[Document, ...] = (Document(root.name, root.read_text(encoding="utf-8", errors="replace")),)
    else:
        documents = _read_tree(root, _TEXT_SUFFIXES)
    if not documents:
        raise WorkloadError(f"corpus {spec} holds no text", fix=f"supported file types: {sorted(_TEXT_SUFFIXES)}")
    return Corpus(spec, documents)


def is_held_out(document: Document, percent: int = 4) -> bool:
    """Whether a document belongs to the held-out split, decided by a hash of its path, so it never moves."""
    return int.from_bytes(hashlib.sha256(document.path.encode()).digest()[:4], "big") % 100 < percent


def _read_tree(root: Path, suffixes: set[str]) -> tuple[Document, ...]:
    documents = []
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix not in suffixes or relative.name in _EXCLUDED_NAMES:
            continue
        if _EXCLUDED_PARTS & set(relative.parts) or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            documents.append(Document(relative.as_posix(), text))
    return tuple(documents)


def _functions_of(document: Document) -> list[Function]:
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):  # ValueError: a null byte
        return []
    lines = document.text.split("\n")  # as `ast` counts them: `splitlines` also breaks at form feeds
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.decorator_list:
            continue
        doc = ast.get_docstring(node)
        source = "\n".join(line[node.col_offset :] for line in lines[node.lineno - 1 : node.end_lineno])
        if not doc or not 20 <= len(doc) <= 600 or not 80 <= len(source) <= 2400:
            continue
        signature = f"def {node.name}({ast.unparse(node.args)})"
        found.append(Function(document.module, node.name, signature, doc, source))
    return found
