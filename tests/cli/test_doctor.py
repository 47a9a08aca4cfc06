"""`sglang-probe doctor --wheel`: a release that is not installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sglang_probe.cli import app
from sglang_probe.engine.hooks import inventory
from tests.engine.hooks.test_fingerprint import make_wheel


def _sources() -> dict[str, str]:
    """The installed source of every module with a target."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0]).parent
    files: dict[str, str] = {}
    for target in inventory.load_inventory().targets:
        parts = target.target.split(".")
        for n in range(len(parts) - 1, 0, -1):
            file = root.joinpath(*parts[:n]).with_suffix(".py")
            if file.is_file():
                files[file.relative_to(root).as_posix()] = file.read_text(encoding="utf-8")
                break
    return files


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return _sources()


def _doctor(wheel: Path, *more: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["doctor", "--wheel", str(wheel), *more], env={"COLUMNS": "200"})
    return done.exit_code, done.stdout


def test_a_wheel_of_the_installed_release_is_as_reviewed(tmp_path: Path, sources: dict[str, str]) -> None:
    wheel = make_wheel(tmp_path, inventory.installed_version(), files=sources)
    code, out = _doctor(wheel)
    assert code == 0
    assert "0 not as reviewed" in out
    assert wheel.name in out


def test_every_difference_is_told_with_the_feature_that_it_blocks(tmp_path: Path, sources: dict[str, str]) -> None:
    runner = "sglang/srt/model_executor/model_runner.py"
    scheduler = "sglang/srt/managers/scheduler.py"
    changed = sources | {
        runner: sources[runner].replace("def sample(", "def resample("),
        scheduler: sources[scheduler].replace("def run_batch(\n        self,", "def run_batch(\n        self, more,"),
    }
    assert all(changed[name] != sources[name] for name in (runner, scheduler))
    code, out = _doctor(make_wheel(tmp_path, "9.9.9", files=changed), "--json")
    told = json.loads(out)
    assert code == 1
    assert (told["sglang"], told["reviewed"]) == ("9.9.9", False)
    assert told["compared_with"] == inventory.installed_version()
    assert told["blocked"] == ["accounting", "forced decoding"]
    states = {t["target"].rsplit(".", 1)[-1]: t["state"] for t in told["targets"] if t["state"] != "fine"}
    assert states == {"run_batch": "changed", "sample": "missing"}
    assert told["features"]["forced decoding"] == {"fine": 0, "changed": 0, "missing": 1}


def test_a_release_without_what_the_probe_needs_is_told_so(tmp_path: Path) -> None:
    code, out = _doctor(make_wheel(tmp_path, "9.9.9", files={"sglang/srt/utils/auth.py": "def other(): pass\n"}))
    assert code == 1
    assert "9.9.9 has not been reviewed" in out
    features = [t.feature for t in inventory.load_inventory(inventory.known_versions()[-1]).targets]
    n = features.count("accounting")
    assert f"blocks accounting, which every recording needs: {n} missing of {n}" in out
    assert "blocks forced decoding: 1 missing of 1" in out
