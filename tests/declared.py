"""What a machine has on which `pyproject.toml` alone was installed, and running code as if there were nothing else."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"

_BLOCK = """
import json, re, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

told = json.load(sys.stdin)
modules, packages = set(told["modules"]), set(told["packages"])

class Declared(PathFinder):
    # What is not declared is not there: neither its modules nor its metadata.
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        there = top in modules or top.startswith("_sysconfigdata")  # the standard library's, named after the platform
        return PathFinder.find_spec(name, path, target) if there else None

    @classmethod
    def find_distributions(cls, *args, **kwargs):
        found = PathFinder.find_distributions(*args, **kwargs)
        return (d for d in found if re.sub("[-_.]+", "-", d.name).lower() in packages)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Declared]
for name in [n for n in sys.modules if n.partition(".")[0] not in modules and n != "__main__"]:
    del sys.modules[name]
"""


def declared_packages(*extras: str) -> set[str]:
    """Normalised names of what `pyproject.toml` declares, with these extras, and of everything that these require."""
    found: set[str] = {"sglang-probe"}
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    further = [r for extra in extras for r in project["optional-dependencies"][extra]]
    todo = [Requirement(r) for r in (*project["dependencies"], *further)]
    while todo:
        requirement = todo.pop()
        name = _normalised(requirement.name)
        if name in found:
            continue
        found.add(name)
        try:
            further = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # of another platform
            continue
        todo += [r for r in map(Requirement, further) if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def declared_modules(*extras: str) -> set[str]:
    """Top-level modules of the standard library, of the declared packages and of this one."""
    packages = declared_packages(*extras)
    installed = metadata.packages_distributions().items()
    theirs = {module for module, names in installed if any(_normalised(n) in packages for n in names)}
    return theirs | set(sys.stdlib_module_names) | {"sglang_probe"}


def run_declared(code: str, *, extras: Sequence[str] = ("runs",), **given: Any) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process in which nothing undeclared can be imported; it finds `given` in `told`."""
    told = {"modules": sorted(declared_modules(*extras)), "packages": sorted(declared_packages(*extras)), **given}
    return subprocess.run(
        [sys.executable, "-c", _BLOCK + code], input=json.dumps(told), capture_output=True, text=True, check=False
    )


def run_commands(commands: Sequence[Sequence[str]], *, extras: Sequence[str] = ("runs",)) -> dict[str, Any]:
    """Run commands of `sglang-probe` one after another in such a process. Returns the exit code of each by its words,
    or what it died of; commands that were not reached are missing."""
    done = run_declared(
        """
import traceback
from sglang_probe.cli import main
exits = {}
for words in told["commands"]:
    sys.argv = ["sglang-probe", *words]
    try:
        exits[" ".join(words)] = main()
    except SystemExit as e:
        exits[" ".join(words)] = e.code
    except BaseException:
        exits[" ".join(words)] = traceback.format_exc()
print("\\n" + json.dumps(exits))
""",
        extras=extras,
        commands=commands,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout, done.stderr)
    exits: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return exits


def _normalised(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()
