"""What is checked before an engine is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglang_probe.config import Config, parse_config
from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.errors import ConfigError, UnsupportedError
from sglang_probe.harvest import prepare
from sglang_probe.harvest.config import HarvestConfig
from sglang_probe.policy.arm import Arm
from sglang_probe.run import certificate
from sglang_probe.workload.build import Workload


def _prepare(**fields: Any) -> prepare.Prepared:
    config = HarvestConfig.model_validate({"workload": {"source": "shared_prefix"}, **fields})
    return prepare.prepare(config, {"harvest": Arm()}, workload=Workload(()))


ASKED: list[dict[str, Any]] = [{"hook_points": ["hook_embed"]}, {"hook_points": [], "telemetry": {}}]


@pytest.mark.reviewed("accelerator rows")
@pytest.mark.parametrize("fields", ASKED, ids=["rows", "telemetry"])
def test_there_rows_and_telemetry_need_a_certificate(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SGLANG_PROBE_CACHE", str(tmp_path))
    monkeypatch.setattr(prepare, "accelerator_present", lambda: True)
    server = {"attention_backend": "triton", "page_size": 16}
    command = (
        "sglang-probe prove --model probe-text --dtype float32 "
        """--server '{"attention_backend": "triton", "page_size": 16}'"""
    )
    with pytest.raises(UnsupportedError, match=r"no certificate covers it .there is none on this machine.") as refused:
        _prepare(**fields, server=server, dtype="float32")
    assert f"run `{command}`" in str(refused.value)
    config = HarvestConfig.model_validate({"workload": {"source": "shared_prefix"}, **fields, "server": server})
    prepare.prepare(config, workload=Workload(()), proving=True)  # the proof itself has none yet
    _prepare(hook_points=[])  # the ledger alone


@pytest.mark.reviewed("accelerator rows")
def test_a_certificate_of_this_model_and_release_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SGLANG_PROBE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(prepare, "accelerator_present", lambda: True)
    model = prepare.resolve_model("probe-text")
    subject = {
        **prepare.subject_installed(),
        **certificate.model_facts(Path(model.path)),
        "weights_sha256": model.identity["weights_sha256"],
        "attention_backend": "triton",
        "tp_size": 1,
    }
    made = {"schema": certificate.SCHEMA, "time": "now", "passed": True, "subject": subject, "kinds": ["hook_embed"]}
    certificate.write_certificate(tmp_path / "named.json", certificate.sealed(made))
    embed: Any = {"hook_points": ["hook_embed"]}
    _prepare(**embed, certificate=str(tmp_path / "named.json"))
    with pytest.raises(UnsupportedError, match=r"it is of attention_backend triton, and this is fa3"):
        _prepare(**embed, certificate=str(tmp_path / "named.json"), server={"attention_backend": "fa3"})
    with pytest.raises(UnsupportedError, match=r"not of rows of hook_resid_post"):
        _prepare(hook_points=["blocks.0.hook_resid_post"], certificate=str(tmp_path / "named.json"))
    with pytest.raises(UnsupportedError, match="none on this machine"):
        _prepare(**embed)
    certificate.write_certificate(certificate.default_path(subject), certificate.sealed(made))
    _prepare(**embed)
    with pytest.raises(UnsupportedError, match="config_sha256"):
        _prepare(**embed, model="probe-recall")


@pytest.mark.parametrize("model", [HarvestConfig, EngineProbeConfig])
def test_the_switch_that_was_there_before_is_answered(model: type[Config]) -> None:
    with pytest.raises(ConfigError, match=r"unknown key `accelerator`: rows on a GPU need a certificate"):
        parse_config({"accelerator": "unproved"}, model, where="mine.yaml")


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
