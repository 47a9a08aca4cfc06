"""A release that was not reviewed, on trial: what may be tried, what is left out, what is remembered. No engine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_probe.engine.hooks import inventory
from sglang_probe.engine.releases import drift, release
from sglang_probe.errors import ConfigError, InventoryError
from sglang_probe.prove import drift as trials
from sglang_probe.prove.config import ProofConfig

RUN_BATCH = "sglang.srt.managers.scheduler.Scheduler.run_batch"
SAMPLE = "sglang.srt.model_executor.model_runner.ModelRunner.sample"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SGLANG_PROBE_CACHE", str(tmp_path))
    monkeypatch.delenv(drift.TRIAL, raising=False)
    yield
    os.environ.pop(drift.TRIAL, None)
    release.cache_clear()


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Fingerprints of places as if they were others; None: gone."""
    changed: dict[str, str | None] = {}
    real = inventory.fingerprint
    monkeypatch.setattr(
        inventory, "fingerprint", lambda target, *of: changed[target] if target in changed else real(target, *of)
    )
    monkeypatch.setattr(inventory, "find", lambda target, *_of: None if target in changed else object())
    return changed


def test_what_was_reviewed_and_is_as_it_was_is_no_drift() -> None:
    assert trials.begin(accelerator=False) is None
    assert drift.TRIAL not in os.environ


def test_a_changed_place_is_tried_and_accepted_as_it_was_found(change: dict[str, str | None]) -> None:
    version = inventory.installed_version()
    change[RUN_BATCH] = "f" * 16
    with pytest.raises(InventoryError, match="prove --accept-drift"):
        inventory.require(["accounting"])
    trial = trials.begin(accelerator=False)
    assert trial is not None
    inventory.require(["accounting"])  # while it is on trial
    assert trial.suspects("owners, small chunks") == [f"{RUN_BATCH} (accounting): changed"]
    assert trial.suspects("reference") == []
    path = trial.accept("c" * 64)
    assert json.loads(path.read_text())["certificate"] == "c" * 64
    inventory.require(["accounting", "live"])  # and after it
    assert drift.serving(version) == version
    change[RUN_BATCH] = "0" * 16  # it holds for what was found
    with pytest.raises(InventoryError, match=r"run_batch.*changed"):
        inventory.require(["accounting"])


def test_what_a_proof_does_not_show_is_left_out_where_it_changed(change: dict[str, str | None]) -> None:
    change[SAMPLE] = "f" * 16
    trial = trials.begin(accelerator=False)
    assert trial is not None
    assert trial.told["left_out"] == {"forced decoding": f"{SAMPLE} (forced decoding): changed"}
    inventory.require(["accounting", "live"])
    with pytest.raises(InventoryError, match="forced decoding: not reviewed"):
        inventory.require(["forced decoding"])


def test_a_failed_proof_leaves_nothing(change: dict[str, str | None], tmp_path: Path) -> None:
    change[RUN_BATCH] = "f" * 16
    trial = trials.begin(accelerator=False)
    assert trial is not None
    trial.drop()
    assert not list((tmp_path / drift.FOLDER).iterdir())
    with pytest.raises(InventoryError, match="run_batch"):
        inventory.require(["accounting"])


def test_what_every_recording_patches_cannot_be_tried_without_it(change: dict[str, str | None]) -> None:
    change[RUN_BATCH] = None
    with pytest.raises(InventoryError, match=rf"is gone: {RUN_BATCH}"):
        trials.begin(accelerator=False)


def test_an_unreviewed_release_is_served_by_the_nearest_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    nearest = inventory.installed_version()
    for module in (inventory, inventory.importlib.metadata):
        name = "installed_version" if module is inventory else "version"
        monkeypatch.setattr(module, name, lambda *_of: "9.9.9")
    release.cache_clear()
    with pytest.raises(InventoryError, match="reviewed only for"):
        release()
    trial = trials.begin(accelerator=False)
    assert trial is not None
    assert trial.told["as"] == nearest
    assert release().version == nearest
    assert inventory.load_inventory().sglang == "9.9.9"


def test_what_was_accepted_of_a_patched_release_is_not_asked_of_the_stock_one(change: dict[str, str | None]) -> None:
    change[RUN_BATCH] = "f" * 16
    trial = trials.begin(accelerator=False)
    assert trial is not None
    trial.accept("c" * 64)
    del change[RUN_BATCH]  # the stock release is installed again
    assert inventory.require(["accounting"]) == inventory.load_inventory(inventory.installed_version())


def test_an_acceptance_ends_with_the_inventory_that_it_was_compared_with(
    change: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change[RUN_BATCH] = "f" * 16
    trial = trials.begin(accelerator=False)
    assert trial is not None
    trial.accept("c" * 64)
    inventory.require(["accounting"])
    monkeypatch.setattr(drift, "digest", lambda _reviewed: "of a newer probe")
    with pytest.raises(InventoryError, match="run_batch"):
        inventory.require(["accounting"])


@pytest.mark.parametrize("less", [{"server": {"disable_radix_cache": True}}, {"hook_points": ["hook_embed"]}])
def test_a_proof_that_shows_less_accepts_nothing(less: dict[str, object]) -> None:
    trials.refuse_less(ProofConfig.model_validate({"model": "probe-text"}))
    with pytest.raises(ConfigError, match="accepted unseen"):
        trials.refuse_less(ProofConfig.model_validate({"model": "probe-text", **less}))
