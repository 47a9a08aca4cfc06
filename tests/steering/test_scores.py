"""Which vectors a hook point of scores has, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sglang_probe.engine.hooks.config import EngineProbeConfig
from sglang_probe.errors import ConfigError, RunDirectoryError
from sglang_probe.run.run import Run
from sglang_probe.steering.config import ScoresConfig
from sglang_probe.steering.library import Library
from sglang_probe.steering.scores import told, vectors_of, weights_DK
from tests.steering.test_library import FEATURE, WEIGHTS, D, add

FITS: dict[str, Any] = {"width": D, "layers": 4, "weight_hash": WEIGHTS}


@pytest.fixture
def library(tmp_path: Path) -> Path:
    def probe(name: str, layer: int, scale: float) -> None:
        tensors = {"vector": torch.arange(1.0, D + 1) * scale, "threshold": torch.tensor(0.5)}
        add(tmp_path, name, tensors, kind="probe", hook_point=f"blocks.{layer}.hook_resid_post")

    probe("b", 1, 2.0)
    probe("a", 1, 1.0)
    probe("c", 3, 3.0)
    add(tmp_path, "direction")
    add(tmp_path, "feature", FEATURE, kind="feature")
    return tmp_path


def names(library: Path, points: list[str], asked: list[str] | None = None, **fits: Any) -> dict[str, list[str]]:
    config = ScoresConfig(library=library, names=asked)
    return {p: [v.name for v in of] for p, of in vectors_of(config, points, **{**FITS, **fits})[0].items()}


def test_a_hook_point_has_the_probes_of_its_layer_in_the_order_of_their_names(library: Path) -> None:
    assert names(library, ["hook_embed", "blocks.1.hook_scores"]) == {"blocks.1.hook_scores": ["a", "b"]}
    both = ["blocks.3.hook_scores", "blocks.1.hook_scores"]
    assert names(library, both) == {"blocks.3.hook_scores": ["c"], "blocks.1.hook_scores": ["a", "b"]}
    assert names(library, both[1:], ["direction", "b"]) == {"blocks.1.hook_scores": ["b", "direction"]}
    found, digest = vectors_of(ScoresConfig(library=library), both[1:], **FITS)
    assert digest == Library.open(library).hash
    vectors = found["blocks.1.hook_scores"]
    assert weights_DK(vectors).tolist() == [[i, 2 * i] for i in range(1, D + 1)]
    assert told({"p": vectors}) == {"p": {v.name: Library.open(library)[v.name].hash for v in vectors}}


@pytest.mark.parametrize(
    ("points", "asked", "fits", "says"),
    [
        (["blocks.0.hook_scores"], None, {}, "has no probe of that layer"),
        (["blocks.1.hook_scores"], ["c"], {}, "`c` is of `blocks.3.hook_resid_post`"),
        (["blocks.1.hook_scores"], ["feature"], {}, "`feature` is a feature"),
        (["blocks.1.hook_scores"], ["aa"], {}, "no vector `aa` in the library"),
        (["blocks.1.hook_scores"], None, {"weight_hash": "b" * 64}, "was made from weights aaaaaaaaaaaa"),
        (["hook_embed"], None, {}, "`scores` has no effect"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    points: list[str], asked: list[str] | None, fits: dict[str, Any], says: str, library: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        names(library, points, asked, **fits)


def test_a_library_that_was_changed_is_refused(library: Path) -> None:
    config = ScoresConfig(library=library, hash=Library.open(library).hash)
    vectors_of(config, ["blocks.1.hook_scores"], **FITS)
    add(library, "direction", {"vector": torch.ones(D)}, overwrite=True)
    with pytest.raises(ConfigError, match="was changed after the recording was prepared"):
        vectors_of(config, ["blocks.1.hook_scores"], **FITS)


def test_scores_and_their_hook_points_belong_together(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="needs `scores:"):
        EngineProbeConfig(run=tmp_path, hook_points=["blocks.1.hook_scores"])
    with pytest.raises(ValidationError, match="`scores` has no effect"):
        EngineProbeConfig(run=tmp_path, hook_points=["hook_embed"], scores=ScoresConfig(library=tmp_path))


def test_a_run_without_scores_says_so(rows_run: Any) -> None:
    run: Run = rows_run("run", {"r1": (3, 1)}, lambda _rid, _p: torch.ones(4))
    with pytest.raises(RunDirectoryError, match="has no scores"):
        run.scores()
