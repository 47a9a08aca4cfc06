"""One adapter, chosen by the installed version; any other version is refused."""

from __future__ import annotations

import importlib.metadata

import pytest

from sglang_probe import plugin
from sglang_probe.engine.platform import environment
from sglang_probe.engine.releases import load, release
from sglang_probe.errors import InventoryError


def test_the_installed_release_is_chosen() -> None:
    assert release().version == importlib.metadata.version("sglang")


def test_an_unreviewed_release_is_refused_with_those_that_are_reviewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.5.20")
    with pytest.raises(InventoryError, match=r"SGLang 0\.5\.20 is installed.*0\.5\.17, 0\.5\.21, 0\.5\.22, 0\.5\.23"):
        release.__wrapped__()


def test_no_cpu_platform_is_offered_to_an_unreviewed_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.5.20")
    monkeypatch.setattr(environment, "accelerator_present", lambda: False)
    release.cache_clear()
    try:
        with pytest.raises(InventoryError, match="reviewed only for"):
            plugin.activate_cpu_platform()
    finally:
        release.cache_clear()


def test_adapters_differ_where_they_say_they_do() -> None:
    older, newer = load("0.5.17"), load("0.5.23")
    assert older.tree != newer.tree
    assert older.cpu_platform != newer.cpu_platform
    assert (older.overshoots_at_length, newer.overshoots_at_length) == (True, False)
    for subject in ("publication_hooks", "bypass_hooks", "abort_hooks", "control_hooks", "live_hooks"):
        targets = [{target for target, _, _ in getattr(adapter, subject)()} for adapter in (older, newer)]
        assert not targets[0] & targets[1], subject


def test_the_last_two_differ_in_where_a_request_is_made_alone() -> None:
    older, newer = load("0.5.22"), load("0.5.23")
    assert older.request_hooks() != newer.request_hooks()
    for subject in ("publication_hooks", "bypass_hooks", "abort_hooks", "control_hooks", "live_hooks", "row_hooks"):
        assert getattr(older, subject)() == getattr(newer, subject)()
