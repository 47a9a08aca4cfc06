"""`features.json`: no feature or direction gets further than its evidence, and no change goes unnoticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_probe.config import parse_config
from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run
from sglang_probe.run.weights import weight_hash
from sglang_probe.steering.features import Direction, FeatureManifest, read_features, write_features
from sglang_probe.steering.library import THRESHOLD, VECTOR, Library, MadeBy, Vector, write
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


def measured(clamp: dict[str, Any] | None = None, **of: Any) -> dict[str, Any]:
    """Evidence of a vector, and of what a clamp does."""
    done = {"mode": "clamp", "value": 0.0} if clamp is None else clamp
    return {**EVIDENCE, "of": {**of, "mode": done["mode"], "value": done.get("value")}}


OURS = measured(feature=17, sae_sha256="c" * 64)


def made(status: str = "hypothesis", *, weights: str = "b" * 64, **feature: Any) -> FeatureManifest:
    one = {"index": 17, "label": "code", "labelled": {"by": "human", "name": "x"}, "owner": "y", "evidence": [OURS]}
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


def test_a_manifest_from_before_there_were_directions_keeps_its_hash() -> None:
    old = made(clamp=CLAMP, evidence=[EVIDENCE])
    assert old.sha256 == "b71833e5c56bfd0e01f61dee657cb2557e5c9c396a982190991c90df4c1ffe95"
    assert "directions" not in old.model_dump(mode="json")


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
        made(evidence=[{**OURS, **evidence}]).moved(17, "validated")
    with pytest.raises(ConfigError, match="no evidence"):
        made("deployed", evidence=[{**OURS, **evidence}], clamp=CLAMP)


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


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Of the model with weights bbbb..."""
    folder = tmp_path_factory.mktemp("library") / "vectors"
    told = {"hook_point": "blocks.1.hook_resid_post", "model": "m", "model_weight_hash": "b" * 64}
    made_by = MadeBy(command="vector make mean-difference", inputs={"positive": {"run": "on"}}, seeds={"split": 0})
    x = torch.arange(4.0)
    write(folder, {VECTOR: x + 1}, name="formal", kind="direction", made_by=made_by, **told)
    write(folder, {VECTOR: x + 1, THRESHOLD: x[0]}, name="fires", kind="probe", made_by=made_by, **told)
    return Library.open(folder)


CAP = {"mode": "cap", "value": -1.5}


def with_direction(vector: Vector, *, features: bool = False, **more: Any) -> FeatureManifest:
    told = {"label": "formal", "labelled": {"by": "human", "name": "x"}, "owner": "y", **more}
    told.setdefault("evidence", [measured(more.get("clamp"), sha256=vector.hash)])
    entry = Direction.of(vector, **told).model_dump(mode="json")
    base = made().model_dump(mode="json")
    if not features:
        base |= {"features": [], "hook_point": None, "sae_sha256": None}
    return parse_config({**base, "directions": [entry]}, FeatureManifest, where="made")


@pytest.mark.parametrize("features", [True, False])
def test_a_direction_has_name_hash_and_recipe_and_goes_the_same_way(
    library: Library, tmp_path: Path, features: bool
) -> None:
    path = tmp_path / "features.json"
    write_features(first := with_direction(library["formal"], features=features, clamp=CAP), path)
    (entry,) = read_features(path).directions
    assert (entry.vector, entry.sha256, entry.made_by) == (
        "formal",
        library["formal"].hash,
        first.directions[0].made_by,
    )
    assert entry.made_by.inputs == {"positive": {"run": "on"}}
    entry.check(library["formal"])
    with pytest.raises(ConfigError, match="cannot become `deployed`"):
        first.moved("formal", "deployed")
    deployed = first.moved("formal", "validated").moved("formal", "deployed")
    assert (deployed.revision, deployed.entry("formal").status) == (3, "deployed")
    assert [f.status for f in deployed.features] == ["hypothesis"] * features  # the other entry stays where it was
    told = json.loads(path.read_text())
    told["directions"][0]["clamp"]["value"] = -1.4
    path.write_text(json.dumps(told))
    with pytest.raises(ConfigError, match="was changed"):
        read_features(path)


def test_a_direction_needs_the_same_evidence(library: Library) -> None:
    weak = with_direction(
        library["formal"], evidence=[{**measured(CAP, sha256=library["formal"].hash), "control": 0.4}], clamp=CAP
    )
    with pytest.raises(ConfigError, match="direction `formal` cannot be `validated`: no evidence"):
        weak.moved("formal", "validated")
    with pytest.raises(ConfigError, match="`clamp` says"):
        with_direction(library["formal"], status="validated").moved("formal", "deployed")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"clamp": {"mode": "add", "value": 0}}, "does nothing"),
        ({"clamp": {"mode": "cap"}}, "value"),
        ({"clamp": {"mode": "ablate_feature", "value": 1.0}}, "mode"),
        ({"clamp": {**CAP, "threshold": 0.5}}, "threshold"),
        ({"hook_point": "blocks.1.hook_resid_pre"}, "hook_point"),
    ],
)
def test_what_makes_no_sense_of_a_direction_is_refused(library: Library, more: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        with_direction(library["formal"], **more)


def test_another_vector_or_no_direction_is_refused(library: Library, tmp_path: Path, cli: Callable) -> None:
    with pytest.raises(ConfigError, match="`fires` is a probe, and no direction"):
        with_direction(library["fires"])
    told = with_direction(library["formal"]).directions[0]
    elsewhere = told.model_copy(update={"hook_point": "blocks.2.hook_resid_post"})
    with pytest.raises(ConfigError, match="is not what its card says"):
        elsewhere.check(library["formal"])
    path, other = tmp_path / "features.json", tmp_path / "other"
    write_features(with_direction(library["formal"], clamp=CAP), path)
    card = library["formal"].card.model_dump(mode="json", exclude={"width", "norm", "sha256"})
    write(other, {VECTOR: torch.arange(4.0) + 2}, **card)
    assert cli("manifest", "check", path, "--library", library.folder).returncode == 0
    refused = cli("manifest", "check", path, "--library", other)
    assert refused.returncode == 2
    assert "direction `formal` has the hash" in refused.stderr
    moved = cli("manifest", "move", path, "formal", "validated")
    assert "direction `formal` is validated" in moved.stdout


def test_entries_have_names_of_their_own_and_features_an_sae(library: Library) -> None:
    vector = library["formal"]
    renamed = Vector(vector.card.model_copy(update={"name": "17"}), vector.tensors)
    with pytest.raises(ConfigError, match="feature 17 is listed twice"):
        with_direction(renamed, features=True)
    assert with_direction(renamed).entry(17).title == "direction `17`"
    told = made().model_dump(mode="json") | {"sae_sha256": None}
    with pytest.raises(ConfigError, match="features are of an SAE"):
        parse_config(told, FeatureManifest, where="made")


def test_evidence_that_does_not_say_what_it_is_of_is_read_and_lets_nothing_act(tmp_path: Path) -> None:
    write_features(old := made(clamp=CLAMP, evidence=[EVIDENCE]), tmp_path / "features.json")
    assert read_features(tmp_path / "features.json") == old
    with pytest.raises(ConfigError, match="does not say what it was measured of: enter that as its `of`"):
        old.moved(17, "validated")


@pytest.mark.parametrize(
    "of", [{"feature": 18}, {"sae_sha256": "d" * 64}, {"mode": "cap"}, {"value": 1.0}, {"feature": None}]
)
def test_evidence_of_something_else_does_not_count(of: dict[str, Any]) -> None:
    told = {**OURS, "of": {**OURS["of"], **of}}
    with pytest.raises(ConfigError, match=r"no evidence of its own vector, mode and value|names a direction by"):
        made(clamp=CLAMP, evidence=[told]).moved(17, "validated")


def _next(manifest: FeatureManifest, **direction: Any) -> FeatureManifest:
    """The next revision, by hand: with other fields of the direction."""
    told = manifest.model_dump(mode="json") | {"revision": manifest.revision + 1, "previous": manifest.sha256}
    told["directions"][0] |= direction
    return parse_config(told, FeatureManifest, where="by hand")


def test_a_revision_cannot_deploy_what_was_not_validated_under_another_vector_value_or_number(
    library: Library, tmp_path: Path
) -> None:
    path, add = tmp_path / "features.json", {"mode": "add", "value": 1e6}
    hash_ = library["formal"].hash
    both = [measured(CAP, sha256=hash_), measured(add, sha256=hash_)]
    write_features(first := with_direction(library["formal"], clamp=CAP, evidence=both), path)
    with pytest.raises(ConfigError, match="is `hypothesis` in revision 1, and cannot be `deployed`"):
        write_features(_next(first, status="deployed"), path)
    write_features(second := first.moved("formal", "validated"), path)
    write_features(third := second.moved("formal", "deployed"), path)
    with pytest.raises(ConfigError, match="no evidence of its own vector"):
        _next(third, sha256="e" * 64)
    swapped = [measured(CAP, sha256="e" * 64)]
    for change in ({"clamp": add}, {"sha256": "e" * 64, "evidence": swapped}):
        with pytest.raises(ConfigError, match="new, or of another vector, value or weights than before"):
            write_features(_next(third, **change), path)
    jump = third.model_dump(mode="json") | {"revision": 9, "previous": third.sha256}
    with pytest.raises(ConfigError, match=r"another revision \(3\) than the one that this \(revision 9\) follows"):
        write_features(parse_config(jump, FeatureManifest, where="jump"), path)
    assert read_features(path) == third
    write_features(fourth := _next(third, clamp=add, status="hypothesis"), path)
    write_features(fifth := fourth.moved("formal", "retired"), path)
    with pytest.raises(ConfigError, match="`retired`, which is for good"):
        write_features(_next(fifth, status="hypothesis"), path)


def test_evidence_of_a_run_is_compared_with_the_run_that_is_named(library: Library) -> None:
    manifest = with_direction(library["formal"])
    assert manifest.check_run("dose", "a" * 64) == 1
    assert manifest.check_run("another", "e" * 64) == 0
    with pytest.raises(ConfigError, match="evidence of direction `formal` is of a run `dose` whose manifest has"):
        manifest.check_run("dose", "e" * 64)
