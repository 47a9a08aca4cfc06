"""Known dose-response curves are compared where their side effects are equal; arms that are alike are told apart no
more often than their level."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sglang_probe.errors import ProbeError
from sglang_probe.studies.steer_dose.config import Comparison
from sglang_probe.studies.steer_dose.names import NEUTRAL, TEXT, Place
from sglang_probe.studies.steer_dose.statistics import (
    Path,
    at_level,
    at_levels,
    compare,
    doses,
    incomplete,
    paths,
    per_family,
    without,
)
from sglang_probe.studies.steer_dose.study import told

TEXTS, DOSES = 14, np.array([0.0, 1.0, 2.0, 4.0])
"""The planted arm costs 0.02 a unit and gains 0.5 a unit; the random one costs as much and gains nothing."""
COST, GAIN = 0.02, 0.5


def planted(rng: np.random.Generator, gain: float, cost: float = COST, *, noise: float = 0.3) -> Path:
    """An arm whose texts differ in what they gain, and whose neutral texts in what they cost."""
    level = gain + noise * rng.standard_normal((TEXTS, 1))
    effect = level * DOSES + 0.1 * rng.standard_normal((TEXTS, 4)) * (DOSES > 0)
    side = cost * DOSES * rng.gamma(6, 1 / 6, (TEXTS, 1))
    return Path(effect, side)


def test_the_effect_is_taken_where_the_side_effect_first_reaches_the_level() -> None:
    effect, side = np.array([0.0, 1.0, 3.0, 2.0]), np.array([0.0, 0.1, 0.05, 0.3])
    assert at_level(effect, side, 0.05) == pytest.approx(0.5)
    assert at_level(effect, side, 0.1) == pytest.approx(1.0)
    assert at_level(effect, side, 0.175) == pytest.approx(2.5)
    assert at_level(effect, side, 0.31) == np.inf


def test_a_planted_difference_at_equal_side_effect_is_recovered() -> None:
    """Twice as dear an arm has half the effect at a level, whatever its doses are called."""
    level, held = 0.05, {"dear": 0, "random": 0}
    asked = [Comparison(arm="good", against=name, at=level) for name in held]
    for seed in range(60):
        rng = np.random.default_rng(seed)
        found = {
            "good": planted(rng, GAIN),
            "dear": planted(rng, GAIN, 2 * COST),
            "random": planted(rng, 0.0),
        }
        told = compare(found, asked)
        # Without noise: gain / cost * level.
        true = {"dear": GAIN / COST * level / 2, "random": GAIN / COST * level}
        for name, row in zip(held, told.itertuples(), strict=True):
            held[name] += row.low <= true[name] <= row.high
    assert min(held.values()) >= 54, held


def test_arms_that_are_alike_are_told_apart_no_more_often_than_their_level() -> None:
    asked = [Comparison(arm="one", against="other", at=0.05), Comparison(arm="one", against="other")]
    p = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        p.append(compare({"one": planted(rng, 0.0), "other": planted(rng, 0.0)}, asked)["holm"].min())
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5


def test_an_arm_that_does_not_reach_the_level_has_no_effect_there_and_counts_as_not_rejected() -> None:
    rng = np.random.default_rng(0)
    found = {"strong": planted(rng, GAIN), "weak": planted(rng, GAIN, COST / 100)}
    levels = at_levels(found, [0.05]).set_index("arm")
    assert np.isfinite(levels.loc["strong", ["effect", "low", "high"]].astype(float)).all()
    assert levels.loc["weak", ["effect", "low", "high"]].isna().all()
    asked = [Comparison(arm="strong"), Comparison(arm="strong", against="weak", at=0.05)]
    told = compare(found, asked)
    alone = compare(found, asked[:1])
    assert told["p"].isna().tolist() == [False, True]
    assert told["holm"][0] == pytest.approx(2 * alone["holm"][0])


def test_at_its_own_side_effect_an_arm_of_one_dose_is_compared_with_a_path() -> None:
    """As prompts are: one dose, which costs what it costs."""
    x = np.arange(8)[:, None] * np.zeros((1, 2))
    prompt = Path(x + np.array([0.0, 3.0]), x + np.array([0.0, 0.05]))
    x = np.zeros((8, 3))
    vector = Path(x + np.array([0.0, 1.0, 5.0]), x + np.array([0.0, 0.03, 0.07]))
    told = compare({"prompt": prompt, "vector": vector}, [Comparison(arm="prompt", against="vector")]).iloc[0]
    assert told["side_effect"] == pytest.approx(0.05)
    assert told["difference"] == pytest.approx(3.0 - 3.0)


def test_p_and_interval_say_the_same() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        found = {"one": planted(rng, 0.15), "other": planted(rng, 0.0)}
        row = compare(found, [Comparison(arm="one", against="other", at=0.05)]).iloc[0]
        assert (row["p"] <= 0.05) == (row["low"] > 0 or row["high"] < 0), seed


def test_five_texts_have_no_interval() -> None:
    rng = np.random.default_rng(0)
    few = Path(planted(rng, GAIN).effect_TK[:5], planted(rng, GAIN).side_NK)
    row = compare({"one": few, "other": few}, [Comparison(arm="one")]).iloc[0]
    assert np.isfinite(row["difference"])
    assert np.isnan(row["low"])
    assert np.isnan(row["p"])


def test_vectors_of_an_arm_and_texts_of_a_family_are_averaged_first() -> None:
    rows = [
        (TEXT, "random", "a", 1, "f", 0.2, 1.0, 0.0),
        (TEXT, "random", "b", 1, "f", 0.2, 3.0, 0.0),
        (TEXT, "random", "a", 1, "g", 0.2, 5.0, 0.0),
        (NEUTRAL, "random", "a", 1, "n", 0.4, 9.0, 0.0),
    ]
    names = ["scope", "arm", "what", "dose", "family", "kl", "shift", "nll"]
    families = per_family(pd.DataFrame(rows, columns=names))
    path = paths(families)["random"]
    assert path.effect_TK.tolist() == [[0.0, 2.0], [0.0, 5.0]]
    assert path.side_NK.tolist() == [[0.0, 0.4]]
    assert doses(families).set_index("scope").loc[TEXT, "shift"] == pytest.approx(3.5)


def test_a_family_without_a_number_is_left_out_of_every_arm() -> None:
    rng = np.random.default_rng(0)
    rows = [
        (scope, arm, "v", dose, f"{scope}{family}", abs(rng.normal()) * dose, dose + rng.normal(), 0.0)
        for scope in (TEXT, NEUTRAL)
        for arm in ("x", "y")
        for dose in (1, 2)
        for family in range(8)
        for _ in range(2)
    ]
    steps = pd.DataFrame(rows, columns=["scope", "arm", "what", "dose", "family", "kl", "shift", "nll"])
    asked = [Comparison(arm="x", against="y")]
    name = f"{NEUTRAL}3"
    rest = compare(paths(per_family(steps[steps["family"] != name])), asked)
    at = steps.index[(steps["arm"] == "y") & (steps["dose"] == 2) & (steps["family"] == name)]
    steps.loc[at[0], "kl"] = np.nan  # one step of two
    lacking = incomplete(per_family(steps))
    assert lacking == [(NEUTRAL, name, "y", 2)]
    pd.testing.assert_frame_equal(compare(paths(per_family(steps)), asked), rest)
    assert set(steps["family"]) - set(without(steps, lacking)["family"]) == {name}
    assert told(*lacking[0]).startswith(f"Family `{name}` of neutral texts is left out of every arm: arm `y`, dose 2")
    steps.loc[(steps["arm"] == "y") & (steps["dose"] == 2) & (steps["scope"] == TEXT), "shift"] = np.inf
    with pytest.raises(ProbeError, match="no family of texts has a finite number at every dose: arm `y`, dose 2"):
        paths(per_family(steps))


def test_a_place_is_read_back_from_the_id_of_its_request() -> None:
    place = Place("lib/a.py", TEXT, "random", "r-1", 2)
    assert Place.of(place.rid) == place
