"""Who may import what: no circle, rooms in their order, a light core, nothing undeclared after a run is there."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.declared import declared_modules, run_declared

PACKAGE = Path(__file__).parent.parent / "sglang_probe"
FILES = sorted(PACKAGE.rglob("*.py"))
IN_THE_ENGINE = ("plugin.py", "engine/hooks/", "engine/platform/", "engine/releases/")
MAY_IMPORT_SGLANG = (*IN_THE_ENGINE, "harvest/engine.py")

GROUND = {
    "bf16",
    "errors",
    "hashing",
    "paths",
    "config",
    "ask",
    "steer_ask",
    "rows_ask",
    "kept_set",
    "lazy",
    "yaml_text",
}
MAY_IMPORT = {
    **dict.fromkeys(GROUND, GROUND),
    "report": set(),
    "stats": {"errors"},
    "gate": {"client", "run", "stats", "report", *GROUND},
    "policy": GROUND,
    "axes": GROUND,
    "workload": {"axes", *GROUND},
    "run": GROUND,
    "steering": {"sae", "run", "stats", *GROUND},
    "verify": {"steering", "run", "stats", *GROUND},
    "attention": {"run", "stats", *GROUND},
    "eviction": {"attention", "run", "stats", *GROUND},
    "sae": {"run", "stats", *GROUND},
    "monitor": {"steering", "sae", "run", "stats", *GROUND},
    "privacy": {"axes", "run", *GROUND},
    "model": GROUND,
    "remote": {"run", *GROUND},
    "engine": {"remote", "monitor", "sae", "steering", "run", "policy", *GROUND},
    "client": set(),
    "plugin": {"engine", *GROUND},
    "harvest": {
        "engine",
        "remote",
        "steering",
        "model",
        "verify",
        "privacy",
        "run",
        "workload",
        "axes",
        "policy",
        *GROUND,
    },
    "studies": {"harvest", "eviction", "attention", "sae", "steering", "verify", "run", "workload", "axes", "policy"}
    | {"monitor", "stats", "report", *GROUND},
    "prove": {"harvest", "engine", "verify", "stats", "run", "workload", "policy", *GROUND},
    "export": {"studies", "sae", "run", *GROUND},
    "cli": {"gate", "export", "studies", "prove", "harvest", "monitor", "privacy", "steering", "sae", "model", "verify"}
    | {"engine", "remote", "run", "report", *GROUND},
    "__main__": {"cli"},
    "__init__": {"run", "lazy"},
}
"""Which room may import which. A room is a folder of the package, or a module beside them."""


RECORDING = ("engine/", "harvest/", "prove/", "plugin.py")
"""What makes a run directory; it may need what `pyproject.toml` calls `engine`."""
LAZY = {
    "axes/axis.py": {"transformers"},
    "axes/vocabulary.py": {"transformers"},
    "eviction/removal.py": {"transformers"},
    "export/eagle.py": {"datasets"},
    "export/saelens.py": {"datasets"},
    "model/from_gguf.py": {"gguf"},
    "model/randomise.py": {"transformers"},
    "monitor/adwin.py": {"river"},
    "model/tiny.py": {"tokenizers", "transformers"},
    "model/tokenizer.py": {"tokenizers"},
    "privacy/detect.py": {"presidio_analyzer"},
    "run/samples.py": {"datasets"},
    "sae/saelens.py": {"sae_lens", "transformers"},
    "sae/train.py": {"sae_lens"},
    "studies/trace/setup.py": {"transformers"},
    "verify/listen.py": {"msgspec"},
    "verify/masked_model.py": {"transformers"},
    "verify/reference.py": {"transformers"},
}
"""Undeclared packages that a reader of runs may ask for when it is called; without them it says so in a sentence."""


def _relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _module(path: Path) -> str:
    """Dotted name within the package; of the package itself `__init__`."""
    name = _relative(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    return name


MODULES = {_module(p): p for p in FILES}


def _imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Every import of a file, those within functions too: module and names. Those for the type checker are left out."""

    def statements(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    yield other
                    yield from statements(other)
            else:
                yield child
                yield from statements(child)

    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((a.name, []) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module or "", [a.name for a in node.names]


@cache
def _ours() -> dict[str, set[str]]:
    """What each module imports of the package."""
    found: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        mine = found[module] = set()
        for source, names in _imports(path):
            if source.split(".")[0] != "sglang_probe":
                continue
            inside = source.removeprefix("sglang_probe").removeprefix(".")
            for name in names or [""]:
                full = f"{inside}.{name}".strip(".")
                mine.add(full if full in MODULES else inside or "__init__")
        mine.discard(module)
    return found


def _edges() -> list[tuple[str, str]]:
    return [(module, other) for module, others in _ours().items() for other in sorted(others)]


def test_no_module_imports_itself_through_others() -> None:
    on_the_way: list[str] = []
    done: set[str] = set()

    def visit(module: str) -> None:
        if module in done:
            return
        assert module not in on_the_way, " -> ".join([*on_the_way[on_the_way.index(module) :], module])
        on_the_way.append(module)
        for other in sorted(_ours()[module]):
            visit(other)
        done.add(on_the_way.pop())

    for module in _ours():
        visit(module)


@pytest.mark.parametrize("room", sorted({m.split(".")[0] for m in MODULES}))
def test_a_room_imports_what_lies_below_it(room: str) -> None:
    assert room in MAY_IMPORT, f"say in MAY_IMPORT what {room}/ may import"
    wrong = [
        f"{module} imports {other}"
        for module, other in _edges()
        if module.split(".")[0] == room and (theirs := other.split(".")[0]) != room and theirs not in MAY_IMPORT[room]
    ]
    assert wrong == []


def test_the_rooms_themselves_have_an_order() -> None:
    left = {room: allowed - {room} for room, allowed in MAY_IMPORT.items() if room not in GROUND}
    left = {room: allowed - GROUND for room, allowed in left.items()}
    while left:
        lowest = [room for room, allowed in left.items() if not allowed]
        assert lowest, f"a circle among {sorted(left)}"
        left = {room: allowed - set(lowest) for room, allowed in left.items() if room not in lowest}


@pytest.mark.parametrize("path", FILES, ids=_relative)
def test_only_the_engine_side_imports_sglang(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    sources = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    sources |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert _relative(path).startswith(MAY_IMPORT_SGLANG) or "sglang" not in {s.split(".")[0] for s in sources}


def test_what_reads_runs_names_no_package_that_is_not_declared() -> None:
    declared = declared_modules("runs")
    undeclared: dict[str, set[str]] = {}
    for path in FILES:
        if _relative(path).startswith(RECORDING):
            continue
        if names := {source.split(".")[0] for source, _ in _imports(path)} - declared:
            undeclared[_relative(path)] = names
    assert undeclared == LAZY


def test_what_reads_runs_is_imported_where_nothing_else_is_installed() -> None:
    modules = [f"sglang_probe.{m}" for m in MODULES if not _relative(MODULES[m]).startswith(RECORDING)]
    modules = [m for m in modules if not m.endswith(("__main__", "__init__"))]
    done = run_declared(
        """
import importlib
for module in told["modules_to_import"]:
    importlib.import_module(module)
try:
    import sglang
except ModuleNotFoundError:
    print("blocked")
""",
        modules_to_import=modules,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "blocked\n"


def _loads(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_sglang_nor_pandas() -> None:
    loaded = _loads("import sglang_probe")
    assert not {"torch", "sglang", "transformers", "pandas", "pyarrow", "pydantic"} & loaded


def test_a_process_of_sglang_without_a_scheduler_is_spared_what_only_recording_needs() -> None:
    loaded = _loads("import sglang_probe.engine.hooks.install")
    assert not {"pandas", "pyarrow", "safetensors", "transformers"} & loaded


@pytest.mark.parametrize("door", ["sglang_probe", "harvest", "run", "attention", "eviction", "sae"])
def test_what_a_door_names_is_there(door: str) -> None:
    module = importlib.import_module(door if door == "sglang_probe" else f"sglang_probe.{door}")
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("door", ["harvest", "run", "attention", "sae"])
def test_these_doors_load_nothing(door: str) -> None:
    assert not {"torch", "sglang", "transformers", "pandas", "pyarrow"} & _loads(f"import sglang_probe.{door}")


def test_the_command_line_is_light_until_a_command_runs() -> None:
    loaded = _loads("import sglang_probe.cli")
    assert not {"torch", "sglang", "transformers", "pandas", "pyarrow"} & loaded


def test_the_run_reader_does_not_load_sglang() -> None:
    assert not {"sglang", "transformers"} & _loads("from sglang_probe import load_run")
