"""The reference platform: only where there is no accelerator, and never over the user's own settings."""

from __future__ import annotations

import pytest
import torch

from sglang_probe import plugin
from sglang_probe.engine.platform import environment
from sglang_probe.engine.releases import release


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
