"""A planted decay is recovered, one of depth alone is told from one of decoding, and none is found where none is."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sglang_probe.studies.steer_decay.statistics import (
    DIFFERENCE,
    HUMAN,
    OWN,
    RANDOM,
    VECTOR,
    ZERO,
    after_curves,
    binomial_interval,
    decay,
    effects,
    half_life,
    half_lives,
    per_family,
)

ONSETS, WINDOW, AFTER = (1, 10, 50, 200), 6, 8
SLOPE = 0.05


def planted(own: float, human: float, *, families: int = 16, seed: int = 0, noise: float = 0.2) -> pd.DataFrame:
    """Steps whose shift falls by `own` and `human` per doubling of the onset, and halves in two steps after the window;
    families differ in their level, the random vector has no shift."""
    rng = np.random.default_rng(seed)
    rows = []
    for family in range(families):
        level = 1 + 0.4 * rng.standard_normal()
        for source, slope in ((OWN, own), (HUMAN, human)):
            for arm in (VECTOR, RANDOM):
                for onset in ONSETS:
                    for offset in range(WINDOW + AFTER):
                        size = (level - slope * np.log2(onset)) if arm == VECTOR else 0.0
                        if offset >= WINDOW:
                            size *= 0.3 * 0.5 ** ((offset - WINDOW) / 2)
                        shift = size + noise * rng.standard_normal()
                        rows.append((family, source, arm, onset, offset, shift, 0.1, size))
    return pd.DataFrame(rows, columns=["family", "source", "arm", "onset", "offset", "shift", "kl", "projection"])


def test_a_planted_decay_is_within_its_interval_in_at_least_nine_of_ten_runs() -> None:
    held = {OWN: 0, HUMAN: 0, DIFFERENCE: 0}
    for seed in range(60):
        found = decay(per_family(planted(SLOPE, 0.02, seed=seed), WINDOW)).set_index("what")
        for what, true in ((OWN, -SLOPE), (HUMAN, -0.02), (DIFFERENCE, -SLOPE + 0.02)):
            held[what] += found.loc[what, "slope_low"] <= true <= found.loc[what, "slope_high"]
    assert all(n >= 54 for n in held.values()), held


def test_without_a_decay_the_test_stays_at_its_level() -> None:
    p = [decay(per_family(planted(0, 0, seed=s), WINDOW))["holm"].min() for s in range(200)]
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5


def test_a_decay_of_depth_alone_is_told_from_one_of_decoding() -> None:
    depth = decay(per_family(planted(SLOPE, SLOPE), WINDOW)).set_index("what")
    assert depth.loc[OWN, "holm"] < 0.01
    assert depth.loc[DIFFERENCE, "slope_low"] < 0 < depth.loc[DIFFERENCE, "slope_high"]
    decoding = decay(per_family(planted(SLOPE, 0), WINDOW)).set_index("what")
    assert decoding.loc[DIFFERENCE, "slope_high"] < 0


def test_ratio_and_after_effect_are_those_that_were_planted() -> None:
    steps = planted(SLOPE, 0, noise=0.0, families=8)
    found = decay(per_family(steps, WINDOW)).set_index("what")
    level = steps[(steps["onset"] == 1) & (steps["arm"] == VECTOR) & (steps["offset"] == 0) & (steps["source"] == OWN)]
    first = level["shift"].mean()
    assert found.loc[OWN, "ratio"] == pytest.approx((first - SLOPE * np.log2(200)) / first)
    assert found.loc[HUMAN, "ratio"] == pytest.approx(1)
    assert found.loc[OWN, "families"] == 8
    lives = half_lives(steps, WINDOW)
    assert lives["half_life"].tolist() == pytest.approx([2.0] * 8)
    assert not lives["censored"].any()
    curve = after_curves(steps, WINDOW)
    mine = curve[(curve["source"] == OWN) & (curve["onset"] == 1)].sort_values("after")
    assert mine["after"].tolist() == list(range(1, AFTER + 1))
    assert mine["shift"].iloc[0] == pytest.approx(0.3 * first)


@pytest.mark.parametrize(
    ("curve", "steps"),
    [([4, 3, 1], 1.5), ([-4, -2, 0], 1.0), ([1, 1, 0.9], np.inf), ([0, 1], np.inf), ([], np.inf), ([2, -1], 1 / 3)],
)
def test_a_half_life_is_interpolated_and_may_not_be_reached(curve: list[float], steps: float) -> None:
    assert half_life(np.array(curve, dtype=float)) == pytest.approx(steps)


def test_effects_count_families_that_move_the_other_way() -> None:
    shifts = [1.0, 2.0, 3.0, -1.0, 1.0, 2.0, 1.0, -2.0]
    rows = [(f, OWN, VECTOR, 1, 0, s, 0.5, 0.0) for f, s in enumerate(shifts)]
    rows.append((0, OWN, VECTOR, 1, 0, 3.0, 0.5, 0.0))  # another text of the first family: it counts once, with 2.0
    names = ["family", "source", "arm", "onset", "offset", "shift", "kl", "projection"]
    found = effects(per_family(pd.DataFrame(rows, columns=names), 1)).iloc[0]
    told = np.array([2.0, *shifts[1:]])
    assert found["shift"] == pytest.approx(told.mean())
    assert found["families"] == 8
    assert found["anti"] == 0.25
    assert found["instability"] == pytest.approx(told.std(ddof=1) / told.mean())
    assert (found["anti_low"], found["anti_high"]) == pytest.approx(binomial_interval(2, 8))


def test_no_family_moves_against_a_mean_of_zero() -> None:
    rows = [(f, OWN, ZERO, 1, 0, 0.0, 0.0, 0.0) for f in range(6)]
    names = ["family", "source", "arm", "onset", "offset", "shift", "kl", "projection"]
    assert effects(per_family(pd.DataFrame(rows, columns=names), 1)).iloc[0]["anti"] == 0


def test_the_interval_of_a_share_is_that_of_clopper_and_pearson() -> None:
    assert binomial_interval(0, 10) == pytest.approx((0, 0.3085), abs=1e-4)
    assert binomial_interval(2, 8) == pytest.approx((0.0319, 0.6509), abs=1e-4)
    assert binomial_interval(10, 10) == pytest.approx((0.6915, 1), abs=1e-4)
