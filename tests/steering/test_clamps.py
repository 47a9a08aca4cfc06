"""What a server may clamp: a validated feature of its own weights, SAE and hook point, a validated direction of its own
library, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sglang_probe.errors import ConfigError
from sglang_probe.run.weights import weight_hash_of_folder
from sglang_probe.steer_ask import Steer
from sglang_probe.steering.clamps import ClampConfig, read_clamps, spec_of_clamps
from sglang_probe.steering.evidence import Evidence
from sglang_probe.steering.library import THRESHOLD, Library
from sglang_probe.steering.resolve import spec_of
from sglang_probe.steering.spec import merged
from tests.end_to_end.steering import MODEL, POINTS, WIDTH, make_library
from tests.steering.clamped import FEATURE, make_clamp, make_direction
from tests.steering.test_features import measured

OF_ANOTHER = Evidence.model_validate(measured({"mode": "cap", "value": -0.5}, sha256="d" * 64))


def read(folder: Path, weights: str | None = None, **made: Any) -> list[Any]:
    entry = ClampConfig.model_validate({**make_clamp(folder, **made), "probe": "fires"})
    return read_clamps(
        [entry],
        make_library(folder / "vectors"),
        width=WIDTH,
        layers=4,
        weight_hash=weights or weight_hash_of_folder(MODEL),
    )


@pytest.mark.parametrize("status", ["validated", "deployed"])
def test_a_validated_feature_is_clamped_as_its_manifest_says(tmp_path: Path, status: str) -> None:
    (clamp,) = read(tmp_path, status=status)
    step = clamp.step
    assert (step.op, step.amount, step.gated, step.prompt, step.generation) == ("clamp", 0.0, True, None, (1, None))
    assert clamp.vector.scalar(THRESHOLD) == 5.0  # of the clamp, which is above that of the SAE
    spec = spec_of_clamps([clamp], make_library(tmp_path / "library"))
    assert spec is not None
    assert spec.probe is not None
    assert spec.probe.name == "fires"
    assert clamp.told()["status"] == status
    (other,) = read(tmp_path / "two", feature={"clamp": {"mode": "ablate_feature", "threshold": 0.0}})
    assert (other.step.op, other.step.amount, other.vector.scalar(THRESHOLD)) == ("ablate_feature", 1.0, 1.0)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"status": "hypothesis"}, "is `hypothesis`, and only"),
        ({"status": "retired"}, "is `retired`"),
        ({"model_weight_hash": "a" * 64}, "the manifest is of `probe-text` with weights aaaaaaaaaaaa"),
        ({"sae_sha256": "b" * 64}, "of an SAE with weights bbbbbbbbbbbb"),
        ({"hook_point": POINTS[2]}, "blocks.2.hook_resid_post"),
        ({"feature": {"clamp": None}}, "has no `clamp`"),
        ({"feature": {"index": FEATURE + 1}}, f"`{FEATURE}` is not in the manifest"),
    ],
)
def test_what_may_not_act_is_refused_before_anything_is_served(tmp_path: Path, made: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, **made)


def test_gates_are_probes_of_the_library_and_all_clamps_have_one(tmp_path: Path) -> None:
    (clamp,) = read(tmp_path)
    library: Library = make_library(tmp_path / "library")
    other = type(clamp)(clamp.config.model_copy(update={"probe": "up"}), clamp.manifest, clamp.entry, clamp.vector)
    with pytest.raises(ConfigError, match="`up` is a direction"):
        spec_of_clamps([other], library)
    with pytest.raises(ConfigError, match="a request has one probe"):
        spec_of_clamps([clamp, other], library)
    assert spec_of_clamps([], library) is None


def test_within_a_layer_a_clamp_of_the_server_acts_after_what_the_request_asks(tmp_path: Path) -> None:
    library = make_library(tmp_path / "library")
    clamps = spec_of_clamps(read(tmp_path), library)
    own = spec_of([Steer(vector="up", strength=6.0), Steer(vector="up", strength=2.0)], library, where="steer")
    assert clamps is not None
    assert own is not None
    assert {s.layer for s in (*own.steps, *clamps.steps)} == {1}
    assert merged(clamps, own).steps == (*own.steps, *clamps.steps)


def read_direction(folder: Path, *, asked: str = "up", weights: str | None = None, **fields: Any) -> list[Any]:
    library = make_library(folder / "vectors")
    made = make_direction(library["up"], **fields.pop("made", {}))
    make_clamp(folder, directions=[made.model_copy(update=fields)])
    given = {"manifest": str(folder / "features.json"), "direction": asked, "probe": "fires"}
    entry = ClampConfig.model_validate(given)
    return read_clamps([entry], library, width=WIDTH, layers=4, weight_hash=weights or weight_hash_of_folder(MODEL))


@pytest.mark.parametrize(("mode", "value"), [("cap", -0.5), ("clamp", 2.0), ("project_out", 1.0), ("add", -3.0)])
def test_a_validated_direction_is_done_as_its_manifest_says(tmp_path: Path, mode: str, value: float) -> None:
    (clamp,) = read_direction(tmp_path, made={"clamp": {"mode": mode, "value": value}})
    library = Library.open(tmp_path / "vectors")
    spec = spec_of_clamps([clamp], library)
    assert spec is not None
    # The same as a request that names the vector: its own hash, on every generated token.
    gate = {"by": "probe", "probe": "fires"}
    asked = Steer.model_validate({"vector": "up", "op": mode, "strength": value, "phases": ["decode"], "gate": gate})
    assert spec == spec_of([asked], library, where="steer")
    told = clamp.told()
    assert (told["direction"], told["hash"]) == ("up", library["up"].hash)
    assert {"feature", "sae_sha256"}.isdisjoint(told)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"status": "hypothesis"}, "direction `up` of .* is `hypothesis`, and only"),
        ({"status": "retired"}, "is `retired`"),
        ({"clamp": None}, "has no `clamp`"),
        (
            {"sha256": "d" * 64, "evidence": [OF_ANOTHER]},
            "direction `up` has the hash dddddddddddd in the manifest",
        ),
        ({"hook_point": POINTS[2]}, "is not what its card says"),
        ({"vector": "gone", "asked": "gone"}, "direction `gone` of .* is not in the library, which has"),
        ({"asked": "late"}, "`late` is not in the manifest; it lists 3, up"),
        ({"asked": "3"}, "feature 3 of .* is asked for by the wrong key"),
        ({"weights": "a" * 64}, "the manifest is of `probe-text` with weights"),
    ],
)
def test_a_direction_that_may_not_act_is_refused_too(tmp_path: Path, made: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_direction(tmp_path, **made)


@pytest.mark.parametrize(
    "given", [{}, {"feature": 3}, {"feature": 3, "sae": "s", "direction": "up"}, {"direction": "up", "sae": "s"}]
)
def test_a_clamp_is_by_one_entry_of_the_manifest(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"give either|needs its `sae`"):
        ClampConfig.model_validate({"manifest": "m", "probe": "p", **given})
