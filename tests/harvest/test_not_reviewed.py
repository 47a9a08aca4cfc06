"""On a release that was not reviewed for a feature, what needs it is refused by name before anything is started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.config import parse_config
from sglang_probe.engine.hooks import inventory
from sglang_probe.errors import InventoryError
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.harvest.experiment import RunSpec, record
from sglang_probe.harvest.prepare import prepare
from sglang_probe.studies.evict import runs as evict
from sglang_probe.studies.evict.config import EvictionConfig
from sglang_probe.studies.factorial import runs as factorial
from sglang_probe.studies.factorial.config import FactorialConfig

WORKLOAD = {"source": "documents", "count": 2, "chars": 400}


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have the installed release not be reviewed for a feature."""
    real = inventory.load_inventory

    def drop(feature: str) -> None:
        def load(version: str | None = None) -> inventory.Inventory:
            found = real(version)
            return found.model_copy(update={"targets": [t for t in found.targets if t.feature != feature]})

        monkeypatch.setattr(inventory, "load_inventory", load)

    return drop


def refused(feature: str) -> Any:
    return pytest.raises(InventoryError, match=rf"^([a-z ]+, )?{feature}(, [a-z ]+)?: not reviewed on SGLang")


def test_eviction(without: Callable[[str], None]) -> None:
    fields = {"workloads": {"recall": {"source": "retrieval", "count": 4}}, "methods": ["random"], "budgets": ["1/8"]}
    without("eviction")
    with refused("eviction"):
        evict.prepare(parse_config({"model": "probe-recall", **fields}, EvictionConfig, where="test"))
    evict.prepare(parse_config({"model": "probe-recall", "in_engine": False, **fields}, EvictionConfig, where="test"))


@pytest.mark.parametrize("feature", ["positions", "eviction"])
def test_a_factorial(feature: str, without: Callable[[str], None]) -> None:
    layers = {"layers": [0, 1, 2, 3], "evict_positions": ["true"]}
    config = FactorialConfig.model_validate({"workload": WORKLOAD, **layers})
    without(feature)
    with refused(feature):
        factorial.prepare(config)


def test_requests_that_prescribe_positions(without: Callable[[str], None], tmp_path: Path) -> None:
    prepared = prepare(HarvestConfig.model_validate({"workload": WORKLOAD}))
    first, second = prepared.workload.requests
    asked = {"max_new_tokens": 4, "custom_params": {"probe": {"positions": {"from": 4, "to": 0}}}}
    without("positions")
    with refused("positions"):
        record([RunSpec("run", [first, replace(second, sampling_params=asked)])], prepared, tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("feature", "fields"),
    [
        ("telemetry", {"telemetry": {}}),
        ("accelerator rows", {"hook_points": ["hook_embed"], "simulated_graphs": True}),
    ],
)
def test_rows_and_telemetry(feature: str, fields: dict[str, Any], without: Callable[[str], None]) -> None:
    without(feature)
    with refused(feature):
        prepare(HarvestConfig.model_validate({"workload": WORKLOAD, **fields}))
