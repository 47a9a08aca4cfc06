"""What a server clamped of itself is made again as the manifest states it, and where the server differed is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_probe.config import parse_config
from sglang_probe.errors import ConfigError
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.steering.clamps import Clamp, ClampConfig, read_clamps, spec_of_clamps
from sglang_probe.steering.features import FeatureManifest, read_features, write_features
from sglang_probe.steering.library import Library
from sglang_probe.steering.resolve import spec_of
from sglang_probe.steering.spec import Spec
from sglang_probe.studies.replay.clamped import Clamped, clamped, clamps_of
from sglang_probe.studies.replay.stated import entries_of, stated
from tests.end_to_end.steering import MODEL, WIDTH, make_library
from tests.steering.clamped import make_clamp, make_direction
from tests.steering.test_features import measured


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """What a server makes of its configuration, and what its run says of that."""
    folder = tmp_path_factory.mktemp("server")
    library = make_library(folder / "library")
    config = ClampConfig.model_validate({**make_clamp(folder), "probe": "fires"})
    clamp: Clamp = read_clamps([config], library, width=WIDTH, layers=4, weight_hash=weight_hash_of_folder(MODEL))[0]
    done = spec_of_clamps([clamp], library)
    told = clamps_of({"steer": {"clamps": [clamp.told()]}})
    return SimpleNamespace(folder=folder, library=library, sae=config.sae, path=config.manifest, done=done, told=told)


def again(made: SimpleNamespace, folder: Path, manifest: FeatureManifest | None = None) -> Clamped:
    return clamped(made.told, manifest or read_features(made.path), made.library, made.sae, folder / "library")


def changed(made: SimpleNamespace, **fields: Any) -> FeatureManifest:
    told = read_features(made.path).model_dump(mode="json")
    told["features"][0] |= fields
    feature = told["features"][0]
    feature["evidence"] = [measured(feature["clamp"], feature=feature["index"], sae_sha256=told["sae_sha256"])]
    return parse_config(told, FeatureManifest, where="changed")


def asked_again(made: SimpleNamespace, found: Clamped) -> tuple[Spec | None, tuple[str, ...]]:
    should = stated(made.done, found.features, found.library, found.served)
    return spec_of(should.steer, Library.open(found.library.folder), where="steer"), should.differences


def test_the_servers_clamp_is_asked_for_again_by_a_library_and_does_the_same(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    spec, differences = asked_again(made, again(made, tmp_path))
    assert differences == ()
    assert spec is not None
    done = made.done.steps[0]
    same = ("hook_point", "op", "amount", "gated", "prompt", "generation", "exclude", "probe")
    assert all(getattr(spec.steps[0], n) == getattr(done, n) for n in same)
    # Its hash counts the card, and so all tensors, the threshold of the clamp among them.
    assert spec.steps[0].hash == done.hash


def test_a_later_revision_audits_what_an_earlier_one_stated(made: SimpleNamespace, tmp_path: Path) -> None:
    later = read_features(made.path).moved(3, "deployed")
    found = again(made, tmp_path, later)
    assert (found.differences, asked_again(made, found)[1]) == ((), ())


@pytest.mark.parametrize(
    ("clamp", "says"),
    [
        ({"mode": "clamp", "value": 1.0, "threshold": 5.0}, "feature 3: `clamp` 0 was done, and the manifest states"),
        ({"mode": "ablate_feature", "threshold": 5.0}, "feature 3: `clamp` 0 was done"),
        (
            {"mode": "clamp", "value": 0.0, "threshold": 4.0},
            "feature 3: the server had mode clamp value 0.0 threshold 5.0",
        ),
    ],
)
def test_another_clamp_than_the_servers_is_named(made: SimpleNamespace, tmp_path: Path, clamp: dict, says: str) -> None:
    found = again(made, tmp_path, changed(made, clamp=clamp))
    assert any(d.startswith(says) for d in (*found.differences, *asked_again(made, found)[1]))


def test_a_feature_that_may_not_act_is_named(made: SimpleNamespace, tmp_path: Path) -> None:
    found = again(made, tmp_path, changed(made, status="hypothesis"))
    assert asked_again(made, found)[1] == ("feature 3 acted, and is `hypothesis`",)


def test_without_the_sae_or_with_another_or_another_manifest_it_is_refused(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    manifest = read_features(made.path)
    with pytest.raises(ConfigError, match=r"give the folder of their SAE"):
        clamped(made.told, manifest, made.library, None, tmp_path / "x")
    told = manifest.model_dump(mode="json") | {"sae_sha256": "d" * 64}
    told["features"][0]["evidence"][0]["of"]["sae_sha256"] = "d" * 64
    with pytest.raises(ConfigError, match=r"give the SAE of the manifest"):
        again(made, tmp_path, parse_config(told, FeatureManifest, where="x"))
    with pytest.raises(ConfigError, match=r"the server clamped planted, and nothing that the manifest states"):
        again(made, tmp_path, changed(made, index=4))
    write_features(manifest, tmp_path / "same.json")  # refusals wrote nothing in its place
    assert read_features(tmp_path / "same.json") == manifest


def test_a_direction_that_the_server_clamped_is_its_librarys_own(made: SimpleNamespace, tmp_path: Path) -> None:
    listed = make_direction(made.library["late"])
    told = read_features(made.path).model_dump(mode="json") | {"directions": [listed.model_dump(mode="json")]}
    write_features(manifest := parse_config(told, FeatureManifest, where="both"), tmp_path / "both.json")
    config = ClampConfig.model_validate(
        {"manifest": str(tmp_path / "both.json"), "direction": "late", "probe": "fires"}
    )
    (clamp,) = read_clamps([config], made.library, width=WIDTH, layers=4, weight_hash=weight_hash_of_folder(MODEL))
    done = spec_of_clamps([clamp], made.library)
    assert done is not None
    server = clamps_of({"steer": {"clamps": [clamp.told()]}})
    found = clamped(server, manifest, made.library, None, tmp_path / "library")  # no SAE is needed
    assert (found.library, found.served, found.differences) == (made.library, {}, ())
    assert not (tmp_path / "library").exists()
    should = stated(done, entries_of(found.library, manifest), found.library, found.served)
    assert (spec_of(should.steer, found.library, where="steer"), should.differences) == (done, ())
    told["directions"][0]["clamp"]["value"] = told["directions"][0]["evidence"][0]["of"]["value"] = -0.505
    other = clamped(server, parse_config(told, FeatureManifest, where="x"), made.library, None, tmp_path / "library")
    assert other.differences == (
        "direction `late`: the server had mode cap value -0.5, and the manifest mode cap value -0.505",
    )
    told["directions"][0]["sha256"] = told["directions"][0]["evidence"][0]["of"]["sha256"] = "f" * 64
    with pytest.raises(ConfigError, match=r"the server clamped planted too, and nothing that the manifest states"):
        clamped(server, parse_config(told, FeatureManifest, where="x"), made.library, None, tmp_path / "library")
    # Beside a feature, which needs a library of the replay's own, that library has the direction as it was.
    both = clamped([*made.told, *server], manifest, made.library, made.sae, tmp_path / "library")
    assert both.library["late"].hash == made.library["late"].hash
