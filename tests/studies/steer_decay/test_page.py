"""The page is a page whatever was found, and says what the numbers say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from sglang_probe.report.page import render
from sglang_probe.studies.steer_decay.config import SteerDecayConfig
from sglang_probe.studies.steer_decay.page import answer, decay_page
from sglang_probe.studies.steer_decay.statistics import ZERO, after_curves, decay, effects, half_lives, per_family
from sglang_probe.studies.steer_decay.study import SteerDecayResult
from tests.studies.made_results import CHECKS, MANIFEST
from tests.studies.steer_decay.test_statistics import AFTER, ONSETS, SLOPE, WINDOW, planted


def made(own: float, human: float, families: int = 12) -> SteerDecayResult:
    steps = planted(own, human, families=families)
    zero = steps[steps["arm"] == "random"].assign(arm=ZERO, shift=0.0, kl=0.0)
    steps = pd.concat([steps, zero], ignore_index=True)
    by = per_family(steps, WINDOW)
    given = {"vector": "formal", "random": ["chance"], "steer": {"library": "."}, "workload": {"source": "documents"}}
    free = pd.DataFrame([("vector", 1, 0.1, np.nan, np.nan, 0.2)])
    free.columns = pd.Index(["arm", "onset", "excess", "excess_low", "excess_high", "plain"])
    return SteerDecayResult(
        name="made",
        effects=effects(by),
        decay=decay(by),
        decay_kl=decay(by, "kl"),
        after=after_curves(steps, WINDOW),
        half_lives=half_lives(steps, WINDOW),
        free=free,
        downstream=pd.DataFrame(),
        probe=pd.DataFrame(),
        text=pd.DataFrame(),
        steps=steps,
        before=0.0,
        targets={"positive": [1], "negative": [2]},
        families=families,
        checks=CHECKS,
        manifest=MANIFEST,
        config=SteerDecayConfig.model_validate(
            {**given, "onsets": list(ONSETS), "window": WINDOW, "after": AFTER}, context=None
        ),
    )


@pytest.mark.parametrize(
    ("own", "human", "says"),
    [
        (SLOPE, SLOPE, "nothing specific to decoding was found"),
        (SLOPE, 0.0, "falls faster in decoding"),
        (0.0, SLOPE, "falls more slowly in decoding"),
    ],
)
def test_the_answer_tells_decoding_from_depth(own: float, human: float, says: str) -> None:
    found = made(own, human)
    assert says in answer(found)
    page = render(decay_page(found))
    assert "what remains of the effect" in page
    assert "+10.0" in page  # a share of 0.1, in points


def test_an_effect_to_the_other_side_falls_the_other_way() -> None:
    found = made(SLOPE, 0.0)
    turned = {c: -found.decay[c] for c in ("slope", "slope_low", "slope_high")}
    turned |= {"slope_low": turned["slope_high"], "slope_high": turned["slope_low"]}
    e = found.effects
    effect = {"shift": -e["shift"], "shift_low": -e["shift_high"], "shift_high": -e["shift_low"]}
    mirrored = replace(found, decay=found.decay.assign(**turned), effects=e.assign(**effect))
    assert "falls faster in decoding" in answer(mirrored)


def test_a_vector_without_an_effect_cannot_decay() -> None:
    found = made(SLOPE, 0.0)
    rng = np.random.default_rng(0)
    noise = found.steps.assign(shift=rng.standard_normal(len(found.steps)))
    none = replace(found, effects=effects(per_family(noise, WINDOW)))
    assert "no effect at step 1 that is told from zero" in answer(none)
    assert "factor" not in answer(none)


def test_one_text_and_no_text_make_a_page_too() -> None:
    one = made(SLOPE, 0, families=1)
    assert "Too few texts" in answer(one)
    assert "<svg" in render(decay_page(one))
    empty = pd.DataFrame()
    names = ("effects", "decay", "decay_kl", "after", "half_lives", "free", "downstream", "probe", "text", "steps")
    none = replace(one, **dict.fromkeys(names, empty), families=0)
    assert "No decay can be told" in render(decay_page(none))
