"""Installed without a config, the plugin patches nothing; with a wrong one, it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

_PROBE = """
import sys
import sglang.srt.managers.scheduler as s
import sglang.srt.model_executor.model_runner as m
from sglang.srt.plugins import load_plugins
from pkgutil import resolve_name
from sglang_probe.engine.releases import release
load_plugins()
targets = [s.Scheduler.__init__, s.Scheduler.run_batch, s.Scheduler.process_batch_result]
targets += [resolve_name(release().control_hooks()[0][0])]
targets += [m.ModelRunner.forward, m.ModelRunner.load_model, m.ModelRunner.sample]
touched = [f for f in targets if hasattr(f, "__wrapped__") and "hook_registry" in f.__code__.co_filename]
print("TOUCHED", len(touched), "HOOKS", "sglang_probe.engine.hooks" in sys.modules)
"""


def _load_plugins(**env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "SGLANG_PROBE"}
    return subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False, env={**clean, **env}, timeout=300
    )


def test_without_a_config_nothing_is_imported_or_patched() -> None:
    assert "TOUCHED 0 HOOKS False" in _load_plugins().stdout


def test_with_a_config_only_what_it_needs_is_patched(tmp_path: Path) -> None:
    config = tmp_path / "probe.yaml"
    config.write_text(f"run: {tmp_path}\n")
    done = _load_plugins(SGLANG_PROBE=str(config))
    assert "TOUCHED 4 HOOKS True" in done.stdout, done.stderr  # no row taps, no forced decoding


def test_a_wrong_config_stops_the_server_at_start_with_advice(tmp_path: Path) -> None:
    config = tmp_path / "probe.yaml"
    config.write_text(f"run: {tmp_path}\nhook_point: [hook_embed]\n")
    done = _load_plugins(SGLANG_PROBE=str(config))
    assert done.returncode != 0
    assert "did you mean `hook_points`" in done.stderr
