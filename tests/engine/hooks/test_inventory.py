"""The inventory is a gate: what it lists exists in the installed SGLang and is as reviewed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sglang_probe.engine.hooks import http, install, instruments, inventory
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.install import all_hooks
from sglang_probe.engine.live.config import LiveConfig
from sglang_probe.engine.releases import MODULES, load
from sglang_probe.errors import InventoryError
from tests.test_imports import PACKAGE


def test_every_target_is_as_reviewed_in_the_installed_release() -> None:
    states = {f.target.target: f.state for f in inventory.examine(inventory.load_inventory())}
    assert states
    assert set(states.values()) == {"fine"}


def test_every_hook_that_can_be_installed_is_in_the_inventory() -> None:
    _assert_hooks_are_listed(inventory.load_inventory())


def _assert_hooks_are_listed(reviewed: inventory.Inventory) -> None:
    features = {t.feature for t in reviewed.targets}
    config = EngineProbeConfig(
        run=Path("x"),
        hook_points=["hook_embed"],
        simulated_graphs="accelerator rows" in features,
        asks=["force", "cache", *(["positions"] if "positions" in features else [])],
        live=LiveConfig(privacy="ids", traces=True),
    )
    listed = {(t.target, t.hook): t for t in reviewed.targets}
    for target, _hook, kind in all_hooks(config):
        assert listed[target, kind.lower()].feature in instruments.features(config)
    patched = {t.target for t in listed.values() if t.hook in ("around", "after", "before")}
    elsewhere = {"sglang.srt.managers.scheduler.Scheduler.__init__", http.TARGET}
    assert patched == {t for t, _, _ in all_hooks(config)} | elsewhere


def test_attention_is_asked_of_those_alone_who_capture_it() -> None:
    run = Path("x")
    assert "attention rows" not in instruments.features(
        EngineProbeConfig(run=run, hook_points=["blocks.0.hook_resid_post"])
    )
    features = instruments.features(EngineProbeConfig(run=run, hook_points=["blocks.0.attn.hook_v"]))
    targets = {f.target.target for f in inventory.examine(inventory.load_inventory(), features)}
    assert "sglang.srt.layers.radix_attention.RadixAttention.forward" in targets


def test_every_reviewed_release_has_an_adapter_and_an_inventory() -> None:
    assert inventory.known_versions() == list(MODULES)
    assert [load(version).version for version in MODULES] == list(MODULES)


def test_an_adapter_hooks_what_its_inventory_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every release, whichever is installed."""
    for version in MODULES:
        monkeypatch.setattr(install, "release", lambda version=version: load(version))
        _assert_hooks_are_listed(inventory.load_inventory(version))


def test_nothing_but_the_adapters_looks_at_the_version() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                versions = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and "0.5." in str(n.value)]
                assert not versions, f"{path}:{node.lineno}"


def test_a_changed_target_is_refused_with_both_fingerprints(monkeypatch: pytest.MonkeyPatch) -> None:
    real = inventory.fingerprint
    changed = "sglang.srt.managers.scheduler.Scheduler.run_batch"
    monkeypatch.setattr(inventory, "fingerprint", lambda t, *of: "0" * 16 if t == changed else real(t, *of))
    with pytest.raises(InventoryError, match=r"run_batch.*changed; reviewed \w{16}, installed 0{16}"):
        inventory.require(["accounting"])
    inventory.require(["platform"])  # a feature that does not need the target is not refused


def test_a_feature_that_was_reviewed_elsewhere_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = inventory.load_inventory
    installed = real()
    newer = list(MODULES)[-1]
    without = installed.model_copy(update={"targets": [t for t in installed.targets if t.feature != "live"]})
    known = {None: without} | dict.fromkeys(MODULES, without) | {newer: real(newer)}
    monkeypatch.setattr(inventory, "load_inventory", lambda version=None: known[version])
    inventory.require(["accounting"])
    with pytest.raises(InventoryError, match=rf"live: not reviewed on SGLang {installed.sglang}") as e:
        inventory.require(["accounting", "live"])
    assert f"install SGLang {newer}," in str(e.value)


def test_an_unknown_release_is_refused_naming_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory.importlib.metadata, "version", lambda _: "9.9.9")
    with pytest.raises(InventoryError, match=r"9\.9\.9 is installed.*0\.5\.23"):
        inventory.require(["accounting"])


def test_no_sglang_is_refused_naming_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> str:
        raise inventory.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(inventory.importlib.metadata, "version", missing)
    with pytest.raises(InventoryError, match="not installed") as e:
        inventory.require(["accounting"])
    assert "0.5.23" in str(e.value)


def test_a_draft_for_another_release_is_not_taken_for_a_reviewed_one(tmp_path: Path) -> None:
    path = inventory.draft(tmp_path, "0.5.23")
    assert path.name == "sglang-0.5.23.draft.yaml"
    assert all(not v.endswith("draft") for v in inventory.known_versions())
