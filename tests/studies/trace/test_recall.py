"""On probe-recall the positions that an answer needs are known: tracing finds them, matched random ones it does not."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sglang_probe.paths import shipped
from sglang_probe.sae.attribution import GRADIENT, INTEGRATED, Prompt, Scored
from sglang_probe.sae.folder import read_sae, weights_sha256
from sglang_probe.studies.trace.setup import load_model

FOLDER = shipped("models/sae-probe-recall")
SAE = shipped("models/sae-probe-recall/seed-0")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("find_needed", FOLDER / "find_needed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def traced(script: ModuleType) -> list[tuple[Any, Prompt, Scored]]:
    """Twelve puzzles, traced at layer 0."""
    model, sae = load_model(shipped("models/probe-recall/checkpoint")), read_sae(SAE)
    found = []
    for truth in script.puzzles(12, seed=9000):
        prompt = script.prompt_of(model, sae, truth)
        found.append((truth.needed_causal[0], prompt, prompt.scored(steps=20)[0]))
    return found


def test_the_needed_positions_have_the_largest_attributions_and_random_ones_have_not(
    script: ModuleType, traced: list[tuple[Any, Prompt, Scored]]
) -> None:
    rng = np.random.default_rng(0)
    found = [script.ranks(s, GRADIENT, needed) == [1, 2] for needed, _, s in traced]
    random = [script.ranks(s, GRADIENT, script.alike(s, needed, rng)) for needed, _, s in traced]
    # 59 of 60 in needed.json; of 161 positions.
    assert np.mean(found) >= 0.8
    assert not any(r[0] <= 2 for r in random)
    by_line = [script.ranks(s, INTEGRATED, needed) == [1, 2] for needed, _, s in traced]
    assert np.mean(by_line) >= 0.6


def test_each_alone_is_hardly_missed_and_both_together_are_all_of_it(
    script: ModuleType, traced: list[tuple[Any, Prompt, Scored]]
) -> None:
    """As the knock-outs in need.json have it: the answer can be read at either. No attribution shows that, an ablation
    does."""
    rng = np.random.default_rng(0)
    lost = []
    for needed, prompt, scored in traced:
        random = script.alike(scored, needed, rng)
        sets = [*([p] for p in needed), needed, random]
        lost.append(1 - prompt.ablated([script.nodes_at(scored, s) for s in sets]) / prompt.metric)
    first, second, both, other = np.array(lost).T
    assert both.min() > 0.2
    assert both.mean() > 0.8
    assert max(first.max(), second.max()) < 0.2
    assert np.abs(other).max() < 0.02


def test_more_points_make_integrated_gradients_complete(
    script: ModuleType, traced: list[tuple[Any, Prompt, Scored]]
) -> None:
    """20 points miss a fifth of the sum on average: the answer is gained within a short part of the way."""
    for _, prompt, _ in traced[:2]:
        total, should = prompt.scored(steps=160)[0].completeness(prompt.metric)
        assert total == pytest.approx(should, rel=0.03)


def test_what_is_told_of_it_is_of_the_sae_that_ships(script: ModuleType) -> None:
    told = json.loads((FOLDER / "needed.json").read_text())
    assert told["sae"] == weights_sha256(SAE)
    assert told["means"]["needed positions are the top two, gradient"] > 0.9
