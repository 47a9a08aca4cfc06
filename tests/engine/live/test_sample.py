"""The sample configuration is what it says: the defaults."""

from __future__ import annotations

from pathlib import Path

from sglang_probe.config import load_config
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.live.config import LiveConfig


def test_the_sample_spells_out_the_defaults() -> None:
    sample = load_config(Path(__file__).parents[3] / "experiments" / "live.probe.yaml", EngineProbeConfig)
    assert sample == EngineProbeConfig(run=Path("runs/live"), live=LiveConfig())
