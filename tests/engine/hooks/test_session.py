"""What a session learns of the engine that it records."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.engine.hooks.instruments.rows import Rows
from sglang_probe.engine.hooks.session import Session
from sglang_probe.run.selection import RowsConfig


def test_patterns_of_hook_points_become_those_of_the_model_that_was_loaded(tmp_path: Path) -> None:
    at = {"blocks.{0,2}.hook_resid_post": {"window": 4}}
    config = EngineProbeConfig(
        run=tmp_path, hook_points=["hook_embed", "blocks.*.hook_resid_post"], rows=RowsConfig.model_validate({"at": at})
    )
    running = Session(config)
    running.of_model(SimpleNamespace(model=SimpleNamespace(layers=[None] * 3)))
    rows = running.of(Rows)
    assert rows is not None
    assert rows.config is running.config
    assert running.config.hook_points == ["hook_embed", *(f"blocks.{i}.hook_resid_post" for i in range(3))]
    assert [running.config.rows.of(h).window for h in running.config.hook_points] == [0, 4, 0, 4]
