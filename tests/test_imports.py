"""Who may import what: the core is light, and everything behind the run directory works without SGLang."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sglang_probe"
MAY_IMPORT_SGLANG = ("plugin.py", "engine/hooks/", "engine/platform/", "engine/releases/", "harvest/engine.py")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_engine_side_imports_sglang(path: Path) -> None:
    relative = path.relative_to(PACKAGE).as_posix()
    assert relative.startswith(MAY_IMPORT_SGLANG) or "sglang" not in _imports(path)


@pytest.mark.parametrize(
    "folder",
    ["run", "verify", "report", "attention", "eviction", "engine/ledger", "engine/capture", "workload", "axes"],
)
def test_stations_behind_the_run_directory_do_not_reach_back_to_the_engine(folder: str) -> None:
    for path in (PACKAGE / folder).rglob("*.py"):
        text = path.read_text()
        assert "sglang_probe.engine.hooks" not in text, path
        assert "sglang_probe.harvest" not in text, path


def _loads(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_sglang_nor_pandas() -> None:
    loaded = _loads("import sglang_probe")
    assert not {"torch", "sglang", "transformers", "pandas", "pyarrow", "pydantic"} & loaded


@pytest.mark.parametrize("door", ["sglang_probe", "harvest", "run", "attention", "eviction"])
def test_what_a_door_names_is_there(door: str) -> None:
    module = importlib.import_module(door if door == "sglang_probe" else f"sglang_probe.{door}")
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("door", ["harvest", "run", "attention"])
def test_these_doors_load_nothing(door: str) -> None:
    assert not {"torch", "sglang", "transformers", "pandas", "pyarrow"} & _loads(f"import sglang_probe.{door}")


def test_the_command_line_is_light_until_a_command_runs() -> None:
    loaded = _loads("import sglang_probe.cli")
    assert not {"torch", "sglang", "transformers", "pandas", "pyarrow"} & loaded


def test_the_run_reader_does_not_load_sglang() -> None:
    assert not {"sglang", "transformers"} & _loads("from sglang_probe import load_run")
