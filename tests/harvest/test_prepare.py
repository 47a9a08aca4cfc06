"""What is checked before an engine is started."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.harvest import prepare
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.policy.arm import Arm
from sglang_probe.workload.build import Workload


def _prepare(**fields: Any) -> prepare.Prepared:
    config = HarvestConfig.model_validate({"workload": {"source": "shared_prefix"}, **fields})
    return prepare.prepare(config, {"harvest": Arm()}, workload=Workload(()))


@pytest.mark.reviewed("accelerator rows")
def test_rows_need_an_explicit_opt_in_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "accelerator_present", lambda: True)
    with pytest.raises(UnsupportedError, match=r"has been shown on two models of GPU only(.|\n)*accelerator: unproved"):
        _prepare(hook_points=["hook_embed"])
    _prepare(hook_points=[])
    _prepare(hook_points=["hook_embed"], accelerator="unproved")


def test_patterns_of_hook_points_are_those_of_the_model_before_anything_starts() -> None:
    found = _prepare(hook_points=["hook_embed", "blocks.{0..3..2}.attn.hook_v", "blocks.*.hook_resid_post"])
    assert found.config.hook_points == [
        "hook_embed",
        *(f"blocks.{i}.attn.hook_v" for i in (0, 2)),
        *(f"blocks.{i}.hook_resid_post" for i in range(4)),
    ]
    rows = {"at": {"blocks.{0..1}.hook_resid_post": {"window": 8}, "blocks.1.hook_resid_post": {"window": 4}}}
    config = _prepare(hook_points=["hook_embed", "blocks.*.hook_resid_post"], rows=rows).config
    assert {h: config.rows.of(h).window for h in config.hook_points} == {
        "hook_embed": 0,
        "blocks.0.hook_resid_post": 8,
        "blocks.1.hook_resid_post": 4,
        "blocks.2.hook_resid_post": 0,
        "blocks.3.hook_resid_post": 0,
    }


def test_a_pattern_with_a_layer_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`blocks\.4\.hook_resid_post`: the model has 4 layers"):
        _prepare(hook_points=["hook_embed", "blocks.{2..5}.hook_resid_post"])
    with pytest.raises(ConfigError, match="selects from a hook point that is not among"):
        _prepare(hook_points=["hook_embed"], rows={"at": {"blocks.*.hook_resid_post": {"window": 8}}})
