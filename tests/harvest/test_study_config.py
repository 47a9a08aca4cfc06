"""What studies of several runs refuse before they start an engine."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_probe.config import parse_config
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.errors import ConfigError
from sglang_probe.harvest.config import HarvestConfig, Recording
from sglang_probe.studies.ab.config import AbConfig
from sglang_probe.studies.factorial.config import FactorialConfig
from sglang_probe.studies.phase.config import PhaseConfig

WORKLOAD = {"source": "shared_prefix"}


@pytest.mark.parametrize(
    ("study", "fields", "said"),
    [
        (AbConfig, {"rows": {"window": 8}}, "reads all positions"),
        (PhaseConfig, {"rows": {"decode": "none"}, "workload": {"source": "documents"}}, "reads all positions"),
        (FactorialConfig, {"layers": [0], "rows": {"heads": [0]}}, "all positions and heads"),
        (FactorialConfig, {"layers": [0], "telemetry": {}, "evict_positions": ["true"]}, "with `telemetry`"),
        (FactorialConfig, {"layers": [0], "budgets": [1.5]}, "less than 1"),
    ],
)
def test_what_the_end_of_a_study_would_refuse_is_refused_at_its_start(
    study: type[Recording], fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_config({"workload": WORKLOAD, **fields}, study, where="test")


def test_pairs_of_some_heads_are_compared_at_all_positions() -> None:
    rows = {"heads": [0]}
    assert parse_config({"workload": WORKLOAD, "rows": rows}, AbConfig, where="test").rows.heads == [0]
    assert parse_config({"workload": WORKLOAD, "rows": {"window": 8}}, HarvestConfig, where="test").rows.window == 8


def test_a_selection_of_what_is_not_captured_is_refused() -> None:
    rows = {"at": {"blocks.1.attn.hook_rot_k": {"window": 8}}}
    points = ["hook_embed", "blocks.0.attn.hook_rot_k"]
    with pytest.raises(ConfigError, match="not among `hook_points`"):
        parse_config({"run": "x", "hook_points": points, "rows": rows}, EngineProbeConfig, where="test")
    points.append("blocks.1.attn.hook_rot_k")
    parse_config({"run": "x", "hook_points": points, "rows": rows}, EngineProbeConfig, where="test")


def test_an_engine_does_not_measure_requests_with_kept_sets() -> None:
    given = {"run": "x", "asks": ["evict"], "kept": "kept.safetensors"}
    parse_config(given, EngineProbeConfig, where="test")
    with pytest.raises(ConfigError, match="a kept set some"):
        parse_config({**given, "telemetry": {}}, EngineProbeConfig, where="test")
