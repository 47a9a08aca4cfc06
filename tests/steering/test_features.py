"""`features.json`: no feature gets further than its evidence, and no change goes unnoticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_probe.config import parse_config
from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run
from sglang_probe.steering.features import FeatureManifest, read_features, write_features
from sglang_probe.steering.library import weight_hash
from tests.verify.good_run import make_good_run

EVIDENCE: dict[str, Any] = {
    "run": "dose",
    "manifest_sha256": "a" * 64,
    "measure": "log-odds, nats",
    "dose": 1.0,
    "unit": "p99",
    "effect": 0.5,
    "low": 0.3,
    "high": 0.7,
    "control": 0.1,
    "side_effect": 0.01,
    "n": 12,
}
CLAMP = {"mode": "clamp", "value": 0.0, "threshold": 0.8}


def made(status: str = "hypothesis", *, weights: str = "b" * 64, **feature: Any) -> FeatureManifest:
    one = {"index": 17, "label": "code", "labelled": {"by": "human", "name": "x"}, "owner": "y", "evidence": [EVIDENCE]}
    told = {
        "model": "m",
        "model_weight_hash": weights,
        "hook_point": "blocks.1.hook_resid_post",
        "sae_sha256": "c" * 64,
    }
    return parse_config({**told, "features": [{**one, "status": status, **feature}]}, FeatureManifest, where="made")


def test_a_clamp_may_go_past_taking_the_feature_out_and_a_cap_may_not() -> None:
    assert made(clamp={"mode": "clamp", "value": -9.0}).entry(17).clamp is not None
    with pytest.raises(ConfigError, match="a `cap` below zero"):
        made(clamp={"mode": "cap", "value": -9.0})


def test_what_is_written_is_read_and_a_change_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "features.json"
    write_features(made(clamp=CLAMP), path)
    assert read_features(path) == made(clamp=CLAMP)
    told = json.loads(path.read_text())
    told["features"][0]["clamp"]["threshold"] = 0.7
    path.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="was changed"):
        read_features(path)


def test_a_feature_is_deployed_only_after_it_was_validated() -> None:
    first = made(clamp=CLAMP)
    with pytest.raises(ConfigError, match="cannot become `deployed`"):
        first.moved(17, "deployed")
    validated = first.moved(17, "validated")
    deployed = validated.moved(17, "deployed")
    assert (deployed.revision, deployed.previous) == (3, validated.sha256)
    with pytest.raises(ConfigError, match="cannot become `deployed`"):
        deployed.moved(17, "retired").moved(17, "deployed")


@pytest.mark.parametrize(
    "evidence",
    [
        {"low": -0.1},
        {"control": 0.4},
        {"n": 5},
        {"effect": -0.5, "low": -0.7, "high": -0.3, "control": -0.35},
    ],
)
def test_without_an_effect_past_zero_and_control_nothing_is_validated(evidence: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no evidence"):
        made(evidence=[{**EVIDENCE, **evidence}]).moved(17, "validated")
    with pytest.raises(ConfigError, match="no evidence"):
        made("deployed", evidence=[{**EVIDENCE, **evidence}], clamp=CLAMP)


def test_without_a_clamp_nothing_is_deployed() -> None:
    with pytest.raises(ConfigError, match="`clamp` says"):
        made("validated").moved(17, "deployed")


def test_a_revision_follows_the_one_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "features.json"
    first = made(clamp=CLAMP)
    write_features(first, path)
    write_features(first.moved(17, "validated"), path)
    with pytest.raises(ConfigError, match="another revision"):
        write_features(first.moved(17, "retired"), path)


@pytest.mark.parametrize(
    ("feature", "says"),
    [
        ({"labelled": {"by": "model", "name": "judge"}}, "prompt_sha256"),
        ({"clamp": {"mode": "clamp"}}, "need a `value`"),
        ({"evidence": [{**EVIDENCE, "effect": 2.0}]}, "not within its interval"),
        ({"evidence": [{**EVIDENCE, "control": float("nan")}]}, "control"),
        ({"evidence": [{**EVIDENCE, "high": float("inf")}]}, "high"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_makes_no_sense_is_refused(feature: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        made(**feature)


def test_another_models_manifest_is_refused(tmp_path: Path, cli: Callable) -> None:
    run: Run = make_good_run(tmp_path / "good")
    weights = weight_hash(run.manifest["model"]["weights_sha256"])
    assert weights is not None
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    write_features(made(weights=weights), ours)
    write_features(made(), theirs)
    assert cli("manifest", "check", ours, "--run", run.path).returncode == 0
    refused = cli("manifest", "check", theirs, "--run", run.path)
    assert refused.returncode == 2
    assert "weights bbbbbbbbbbbb" in refused.stderr
    moved = cli("manifest", "move", ours, "17", "validated")
    assert moved.returncode == 0, moved.stderr
    assert read_features(ours).entry(17).status == "validated"
