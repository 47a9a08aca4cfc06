"""The reference platform: only where there is no accelerator, and never over the user's own settings."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from sglang_probe import plugin
from sglang_probe.engine.platform import environment
from sglang_probe.engine.releases import release
from sglang_probe.errors import ConfigError
from sglang_probe.harvest import prepare


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.DEVICE, raising=False)  # `make test` sets it


def test_it_activates_where_there_is_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "accelerator_present", lambda: False)
    assert plugin.activate_cpu_platform() == release().cpu_platform


def test_it_never_activates_where_pytorch_sees_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert plugin.activate_cpu_platform() is None


def test_it_never_activates_where_a_gpu_is_hidden_from_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(environment.glob, "glob", lambda p: ["/dev/nvidia0"] if "nvidia" in p else [])
    assert plugin.activate_cpu_platform() is None


def test_it_leaves_sglangs_own_cpu_platform_to_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert plugin.activate_cpu_platform() is None


def test_defaults_are_set_where_the_user_has_not() -> None:
    env = {"PYTHONDONTWRITEBYTECODE": "1"}
    environment.set_process_defaults(env)
    assert env["OMP_NUM_THREADS"] == "1"
    assert env["PYTHONPYCACHEPREFIX"]
    assert "PYTHONDONTWRITEBYTECODE" not in env


def test_the_users_settings_stay() -> None:
    env = {"OMP_NUM_THREADS": "7", "PYTHONPYCACHEPREFIX": "mine", "PYTHONDONTWRITEBYTECODE": "1"}
    assert environment.set_process_defaults(env) == {}
    assert env == {"OMP_NUM_THREADS": "7", "PYTHONPYCACHEPREFIX": "mine", "PYTHONDONTWRITEBYTECODE": "1"}


def test_ranks_share_the_cpus_unless_the_user_said_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "accelerator_present", lambda: False)
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: {0, 1, 2})
    for ranks, expected in ((1, None), (2, "0,2|1"), (4, "0|1|2|0")):
        env: dict[str, str] = {}
        environment.bind_cpus(env, ranks)
        assert env.get("SGLANG_CPU_OMP_THREADS_BIND") == expected
    env = {"SGLANG_CPU_OMP_THREADS_BIND": "7|8"}
    environment.bind_cpus(env, 2)
    assert env == {"SGLANG_CPU_OMP_THREADS_BIND": "7|8"}


_BESIDE_A_GPU = """
import glob, os, sys, torch
torch.cuda.is_available = lambda: os.environ.get("CUDA_VISIBLE_DEVICES") != "-1"
found = glob.glob
glob.glob = lambda p: ["/dev/nvidia0"] if "nvidia" in p else found(p)
from sglang_probe import plugin
from sglang_probe.harvest.engine import default_server_args
from sglang_probe.harvest.prepare import choose_device
if sys.argv[1]:
    choose_device([{"device": sys.argv[1]}, {"device": sys.argv[1]}])
print(default_server_args().get("device"), plugin.activate_cpu_platform(), torch.cuda.is_available())
if sys.argv[1] == "cpu":
    from sglang.srt import platforms
    print(type(platforms.current_platform).__name__, type(platforms._resolve_platform()).__name__)
"""


@pytest.mark.parametrize(
    ("env", "device", "expected"),
    [
        ({}, "", ["None None True"]),
        ({}, "cuda", ["None None True"]),
        ({environment.DEVICE: "cpu"}, "", [f"cpu {release().cpu_platform} False"]),
        ({}, "cpu", [f"cpu {release().cpu_platform} False", "ReferenceCpuPlatform ReferenceCpuPlatform"]),
    ],
    ids=["nothing said", "device: cuda", "variable", "device: cpu"],
)
def test_beside_a_gpu_the_cpu_is_used_by_who_asks_for_it(env: dict[str, str], device: str, expected: list[str]) -> None:
    """A GPU is pretended to PyTorch and as a device file; the last case goes on to SGLang's own choice."""
    clean = {k: v for k, v in os.environ.items() if k not in (environment.DEVICE, "CUDA_VISIBLE_DEVICES")}
    command = [sys.executable, "-W", "ignore", "-c", _BESIDE_A_GPU, device]
    out = subprocess.run(command, capture_output=True, text=True, env={**clean, **env}, check=False)
    assert out.stdout.strip().splitlines() == expected, out.stderr


def test_arms_cannot_differ_in_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "accelerator_present", lambda: True)
    with pytest.raises(ConfigError, match="for all arms"):
        prepare.choose_device([{"device": "cpu"}, {}])


def test_another_device_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.DEVICE, "gpu")
    with pytest.raises(ConfigError, match="set it to cpu, or not at all"):
        environment.accelerator_present()
