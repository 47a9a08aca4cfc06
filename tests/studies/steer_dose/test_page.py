"""The page is a page whatever was found, and says what the registered comparisons say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sglang_probe.config import parse_config
from sglang_probe.errors import ConfigError
from sglang_probe.report.page import render
from sglang_probe.studies.steer_dose.config import SteerDoseConfig
from sglang_probe.studies.steer_dose.names import NEUTRAL, TEXT
from sglang_probe.studies.steer_dose.page import answer, dose_page
from sglang_probe.studies.steer_dose.statistics import at_levels, compare, doses, paths, per_family
from sglang_probe.studies.steer_dose.steps import repetition
from sglang_probe.studies.steer_dose.study import SteerDoseResult, by_vector, side_by_side, with_strengths
from tests.studies.made_results import CHECKS, MANIFEST

GIVEN: dict[str, Any] = {
    "workload": {"source": "documents"},
    "neutral": {"source": "documents"},
    "steer": {"library": "."},
    "target": {"positive": [1], "negative": [2]},
    "arms": {
        "good": {"vectors": ["v"], "doses": [1, 2]},
        "chance": {"vectors": ["r-1", "r-2"], "doses": [1, 2]},
        "prompting": {"prefixes": ["Please."]},
    },
    "registered": [
        {"arm": "good", "against": "chance", "at": 0.1},
        {"arm": "chance"},
        {"arm": "good", "against": "prompting", "at": 0.1},
    ],
}


def made(gain: float, texts: int = 10) -> SteerDoseResult:
    config = SteerDoseConfig.model_validate(GIVEN)
    rng = np.random.default_rng(0)
    rows = []
    for arm, vectors, levels in (("good", ["v"], 2), ("chance", ["r-1", "r-2"], 2), ("prompting", ["prefix"], 1)):
        for what in vectors:
            for dose in range(1, levels + 1):
                for scope in (TEXT, NEUTRAL):
                    for family in range(texts):
                        kl = 0.1 * dose * rng.uniform(0.9, 1.3) * (0.2 if arm == "prompting" else 1)
                        shift = (gain if arm == "good" else 0.0) * dose + 0.1 * rng.standard_normal()
                        rows.append((scope, arm, what, dose, f"{scope}{family}", kl, shift, kl / 2))
    names = ["scope", "arm", "what", "dose", "family", "kl", "shift", "nll"]
    steps = pd.DataFrame(rows, columns=names)
    families = per_family(steps)
    found = paths(families)
    return SteerDoseResult(
        name="made",
        doses=with_strengths(side_by_side(doses(families)), config),
        vectors=by_vector(steps, config),
        levels=at_levels(found, config.side_effects),
        registered=compare(found, config.registered),
        free=pd.DataFrame(),
        selection=pd.DataFrame(),
        steps=steps,
        texts=texts,
        neutral=texts,
        targets={"positive": [1], "negative": [2]},
        checks=CHECKS,
        manifest=MANIFEST,
        config=config,
    )


def test_the_answer_says_what_was_registered_and_what_cannot_be_answered() -> None:
    found = made(1.0)
    said = answer(found)
    assert "Good against chance, at 0.1 nats: +" in said
    assert "Chance at its last dose, against none" in said
    assert "not told from zero (adjusted)" in said
    assert "Good against prompting, at 0.1 nats: not answered" in said
    assert "What each arm gains" in render(dose_page(found))


def test_few_texts_make_a_page_too() -> None:
    one = made(1.0, texts=2)
    assert "without interval" in answer(one)
    assert "<svg" in render(dose_page(one))
    chosen = pd.DataFrame({"feature": [3], "own": [0.2], "target": [0.1], "own_tokens": [[1]], "chosen": [True]})
    config = SteerDoseConfig.model_validate(
        {
            **GIVEN,
            "select": {"sae": ".", "run": "."},
            "arms": {**GIVEN["arms"], "feature": {"selected": True, "doses": [1]}},
        }
    )
    assert "Which features" in render(dose_page(replace(one, selection=chosen, config=config)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"registered": [{"arm": "god"}]}, "`god` is no arm"),
        ({"registered": [{"arm": "good", "against": "good"}]}, "compared with itself"),
        ({"registered": [{"arm": "good", "at": 0.1}]}, "needs an arm to compare with"),
        ({"arms": {**GIVEN["arms"], "x": {"vectors": ["v"]}}}, "need `doses`"),
        ({"arms": {**GIVEN["arms"], "x": {"selected": True, "doses": [1]}}}, "`select` says which features"),
        ({"arms": {**GIVEN["arms"], "x": {"vectors": ["v"], "op": "splice", "doses": [1]}}}, "no dose of a direction"),
        ({"arms": {**GIVEN["arms"], "x": {"vectors": ["v"], "op": "project_out", "doses": [3]}}}, "fraction"),
        ({"side_effects": [0.2, 0.1]}, "positive and ascend"),
        ({"sampling": {"stop": ["x"]}}, "`stop` has no meaning here"),
    ],
)
def test_a_yaml_that_means_nothing_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config({**GIVEN, **change}, SteerDoseConfig, where="test")


def test_repetition_counts_pairs_and_eights() -> None:
    assert repetition(np.arange(20)) == (1.0, 0.0)
    distinct, repeated = repetition(np.tile([1, 2], 10))
    assert distinct == pytest.approx(2 / 19)
    assert repeated == pytest.approx(1 - 2 / 13)
