"""What is released: a wheel that has all that it needs, and files that agree on its version."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from sglang_probe import __version__
from sglang_probe.cli import app

ROOT = Path(__file__).parents[1]


def test_version_names_what_is_installed_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_probe.cli.version._BESIDE", ("numpy", "no-such-package"))
    told = CliRunner().invoke(app, ["--version"])
    assert told.exit_code == 0
    assert told.stdout.splitlines()[0] == f"sglang-probe {__version__}"
    assert re.search(r"^numpy \d", told.stdout, re.MULTILINE)
    assert "no-such-package not installed" in told.stdout


def test_the_citation_and_the_changelog_are_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == __version__
    newest = re.search(r"^## (\S+) \((\S+)\)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest.groups() == (__version__, str(cited["date-released"]))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["license"] == project["license"]


@pytest.mark.slow
def test_a_wheel_has_everything_and_works_without_the_source_tree(tmp_path: Path) -> None:
    """Built, and used in an environment that sees neither this tree nor its installation. It borrows the installed
    dependencies; that they are all declared is `tests/run/test_declared.py`'s to say."""
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "build", "--wheel", "--out-dir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "sglang_probe", "patches"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    expected = {n if n.startswith("sglang_probe/") else f"sglang_probe/_shipped/{n}" for n in tracked}
    assert expected - names == set()
    assert any(n.endswith("licenses/LICENSE") for n in names)
    site = tmp_path / "site"
    subprocess.run([*uv, "pip", "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    code = (
        "import sglang_probe, sys; from sglang_probe.paths import shipped; "
        "print(sglang_probe.__file__); assert shipped('models/probe-text/checkpoint/config.json').exists(); "
        "from sglang_probe.engine.hooks.inventory import load_inventory; print(len(load_inventory().targets))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
