"""Shared helpers: the command line in a subprocess, and experiments small enough for a laptop."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sglang_probe.engine.hooks.inventory import load_inventory
from sglang_probe.engine.releases import release
from tests.warm import children
from tests.warm.commands import shared

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
ENGINE_TESTS = "tests/end_to_end/"


def pytest_sessionstart() -> None:
    children.install()


def pytest_sessionfinish() -> None:
    if shared.cache_info().currsize:
        shared().close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `reviewed(feature, ...)` where the installed release was not reviewed for all of it."""
    asked = [feature for mark in item.iter_markers("reviewed") for feature in mark.args]
    known = {t.feature for t in load_inventory().targets} - release().not_shown if asked else set()
    if missing := sorted(set(asked) - known):
        pytest.skip(f"{', '.join(missing)}: not reviewed on this release")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n 2`: tests that start engines run one behind another in one worker, where they share fixtures; the other
    worker runs the rest meanwhile, file by file."""
    from xdist.scheduler import LoadScopeScheduling

    class EnginesTogether(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return ENGINE_TESTS if nodeid.startswith(ENGINE_TESTS) else nodeid.split("::")[0]

    return EnginesTogether(config, log)


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run `sglang-probe` as a user would, in a process of its own. One with an environment of its own starts afresh."""

    def run(*args: str | Path, timeout: float = 600, **env: str) -> subprocess.CompletedProcess[str]:
        if not env:
            return shared().run([*map(str, args)], {**os.environ, "COLUMNS": "160"}, timeout)
        return subprocess.run(
            [sys.executable, "-m", "sglang_probe", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "COLUMNS": "160", **env},
        )

    return run


@pytest.fixture(scope="session")
def write_yaml(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a harvest or experiment YAML: a small shared-prefix workload, overridden by keyword."""

    def write(name: str, **fields: Any) -> Path:
        workload = {
            "source": "shared_prefix",
            "families": 2,
            "requests_per_family": 5,
            "exemplars": 2,
            **fields.pop("workload", {}),
        }
        path = tmp_path_factory.mktemp("config") / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"workload": workload, "concurrency": 3, **fields}))
        return path

    return write
