"""What the manifest states is asked for again exactly, and every way in which the ledger can differ is named."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sglang_probe.errors import ConfigError
from sglang_probe.steer_ask import Steer
from sglang_probe.steering.features import Direction, Feature, FeatureManifest
from sglang_probe.steering.library import Library
from sglang_probe.steering.resolve import spec_of
from sglang_probe.steering.spec import Spec
from sglang_probe.studies.replay.runs import askable
from sglang_probe.studies.replay.stated import entries_of, stated
from sglang_probe.studies.replay.study import _within_the_floor
from tests.end_to_end.steering import make_library
from tests.steering.clamped import make_direction

EVIDENCE = {
    "run": "dose",
    "manifest_sha256": "b" * 64,
    "measure": "nats",
    "dose": 2.0,
    "unit": "p99",
    "effect": 1.0,
    "low": 0.5,
    "high": 1.5,
    "control": 0.1,
    "side_effect": 0.01,
    "n": 7,
}
CLAMPED = {"vector": "feature", "op": "clamp", "strength": 3.0}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return make_library(tmp_path_factory.mktemp("library") / "vectors")


def feature(clamp: dict[str, Any] | None, status: str = "validated") -> Feature:
    told = {"index": 7, "label": "x", "labelled": {"by": "human", "name": "me"}, "owner": "me"}
    return Feature.model_validate({**told, "evidence": [EVIDENCE], "clamp": clamp, "status": status})


def spec(library: Library, **fields: Any) -> Spec:
    found = spec_of([Steer.model_validate({**CLAMPED, **fields})], library, where="steer")
    assert found is not None
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"phases": ["decode"], "generation_window": [3, 9]},
        {"phases": ["prefill"], "prompt_window": [-4, None], "exclude": [0, 2]},
        {"gate": {"by": "feature"}},
        {"phases": ["decode"], "gate": {"by": "probe", "probe": "fires"}},
        {"phases": ["decode"], "gate": {"by": "probe", "probe": "fires", "active": True}},
        {"op": "ablate_feature", "strength": None},
        {"op": "cap", "strength": 0.5, "exclude": [1]},
    ],
)
def test_what_was_done_as_stated_is_asked_for_again_and_means_the_same(library: Library, fields: dict) -> None:
    done = spec(library, **fields)
    step = done.steps[0]
    clamp = {"mode": step.op, "value": None if step.op == "ablate_feature" else step.amount}
    found = stated(done, {step.hash: feature(clamp)}, library)
    assert found.differences == ()
    assert spec_of(found.steer, library, where="steer") == done


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        (None, "which is no feature or direction of the manifest"),
        (feature(None), "states no clamp"),
        (feature({"mode": "clamp", "value": 3.0}, "hypothesis"), "is `hypothesis`"),
        (feature({"mode": "clamp", "value": 3.0}, "retired"), "is `retired`"),
        (feature({"mode": "clamp", "value": 2.0}), "`clamp` 3 was done, and the manifest states `clamp` 2"),
        (feature({"mode": "cap", "value": 3.0}), "states `cap` 3"),
        (feature({"mode": "clamp", "value": 3.0, "threshold": 0.8}), "its threshold in the library is 0.05"),
        (feature({"mode": "clamp", "value": 3.0, "threshold": 0.05}), "below the manifest's threshold were changed"),
    ],
)
def test_each_way_to_differ_is_named(library: Library, listed: Feature | None, says: str) -> None:
    done = spec(library)
    features = {} if listed is None else {done.steps[0].hash: listed}
    assert says in "; ".join(stated(done, features, library).differences)


def test_a_direction_is_asked_for_again_as_stated_and_what_differs_is_named(library: Library) -> None:
    done = spec(library, vector="up", op="cap", strength=-0.5, phases=["decode"])
    listed = make_direction(library["up"])
    made = {"model": "m", "model_weight_hash": "a" * 64, "directions": [listed]}
    entries = entries_of(library, FeatureManifest.model_validate(made))
    assert entries == {library["up"].hash: listed}
    found = stated(done, entries, library)
    assert found.differences == ()
    assert spec_of(found.steer, library, where="steer") == done
    other = {library["up"].hash: make_direction(library["up"], clamp={"mode": "cap", "value": -0.505})}
    assert stated(done, other, library).differences == (
        "direction `up`: `cap` -0.5 was done, and the manifest states `cap` -0.505",
    )
    retired = {library["up"].hash: make_direction(library["up"], status="retired")}
    assert stated(done, retired, library).differences == ("direction `up` acted, and is `retired`",)
    with pytest.raises(ConfigError, match=r"no feature or direction that the manifest lists \(direction `up`\)"):
        entries_of(library, FeatureManifest.model_validate({**made, "directions": [_of_another(listed)]}))


def _of_another(listed: Direction) -> Direction:
    (evidence,) = listed.evidence
    assert evidence.of is not None
    of = evidence.of.model_copy(update={"sha256": "e" * 64})
    return listed.model_copy(update={"sha256": "e" * 64, "evidence": [evidence.model_copy(update={"of": of})]})


def test_a_vector_that_the_library_lacks_is_refused(library: Library, tmp_path: Any) -> None:
    done = spec(library)
    other = make_library(tmp_path / "vectors")
    unknown = Spec((replace(done.steps[0], hash="0" * 64),))
    with pytest.raises(ConfigError, match="which the library does not have"):
        stated(unknown, {}, other)


def test_a_request_of_which_tokens_were_withheld_is_not_served_again() -> None:
    given = {"a": ([1, 2], [3]), "b": ([1, -1], [3]), "c": ([1, 2], [-1]), "d": ([1], [])}
    prompts, outputs = ([x[i] for x in given.values()] for i in (0, 1))
    lengths = {"prompt_len": list(map(len, prompts)), "output_len": list(map(len, outputs))}
    frame = pd.DataFrame({"rid": list(given), "prompt_ids": prompts, "output_ids": outputs, **lengths})
    run: Any = SimpleNamespace(path="run", requests=lambda: frame)
    assert askable(run)["rid"].tolist() == ["a"]
    frame = frame.iloc[1:]
    with pytest.raises(ConfigError, match="tokens of every request of run were withheld"):
        askable(run)


def test_a_distance_that_is_no_number_is_a_violation() -> None:
    names = ["hook_point", "interventions", "positions", "median", "largest", "floor", "limit"]

    def check(*largest: float) -> str | None:
        rows = [(f"p{i}", True, 3, x, x, 0.0, 1e-6) for i, x in enumerate(largest)]
        return _within_the_floor(pd.DataFrame(rows, columns=names)).violation

    assert check(0.0, 1e-7) is None
    for largest in ([np.nan, 0.0], [0.0, np.nan], [np.nan], [np.nan, np.nan], [0.0, np.inf]):
        violation = check(*largest)
        assert violation is not None
        assert "is not a finite number" in violation
        assert f"p{int(np.argmin(np.isfinite(largest)))}, positions under interventions" in violation
