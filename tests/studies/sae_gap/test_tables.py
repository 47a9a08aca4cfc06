"""The tables recover planted effects, each in its place, and show none where there is none."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from sglang_probe.studies.phase.study import DECODED, HUMAN, REFORWARD
from sglang_probe.studies.sae_gap import tables
from sglang_probe.studies.sae_gap.runs import MEAN, RANDOM, SPLICED
from tests.studies.sae_gap.planted import VARIANCE, points

NO_FLOORS = dict.fromkeys((HUMAN, REFORWARD, DECODED), 0.0)


def row(frame: pd.DataFrame, **where: object) -> pd.Series:
    for column, value in where.items():
        frame = frame[frame[column] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def test_a_drift_that_a_hotter_mixture_hides_is_found_within_bands_and_is_content() -> None:
    found = tables.gaps(points(drift=0.02, hotter=1 / 3), VARIANCE, set(), NO_FLOORS)
    both, content = (row(found, contrast=c, texts="all") for c in ("numerics and content", "content"))
    assert both["gap"] == pytest.approx(0, abs=0.005)
    assert both["within_low"] < 0.02 < both["within_high"]
    assert both["composition_high"] < -0.01
    assert both["gap"] == pytest.approx(both["within"] + both["composition"])
    assert both["gap"] == pytest.approx(content["gap"])
    assert row(found, contrast="numerics", texts="all")["gap"] == 0


def test_without_an_effect_intervals_leave_out_zero_one_time_in_twenty() -> None:
    missed = {"gap": 0, "within": 0, "composition": 0}
    for seed in range(40):
        found = tables.gaps(points(12, 20, seed=seed), VARIANCE, set(), NO_FLOORS)
        both = row(found, contrast="numerics and content", texts="all")
        for name in missed:
            missed[name] += not both[f"{name}_low"] <= 0 <= both[f"{name}_high"]
    assert max(missed.values()) <= 6, missed  # 5 % of 40, and three standard deviations


def test_loops_are_left_out_of_both_kinds() -> None:
    given = points(drift=0.02)
    looping = given["text"].lt(3) & (given["kind"] != HUMAN)
    given.loc[looping, "error"] = 0.0
    found = tables.gaps(given, VARIANCE, {0, 1, 2}, NO_FLOORS)
    everything, rest = (row(found, contrast="content", texts=t) for t in ("all", "without loops"))
    assert everything["gap"] < 0.01
    assert rest["gap_low"] < 0.02 < rest["gap_high"]
    assert (everything["n"], rest["n"]) == (30, 27)


def test_growth_with_depth_is_seen_by_window_and_by_position() -> None:
    found = tables.by_depth(points(by_depth=0.1, texts=60), VARIANCE)
    deep = row(found, window="around 200", contrast="content")
    assert deep["gap_low"] < 0.1 * 192 / 224 < deep["gap_high"]
    early = row(found, window="around 8", contrast="content")
    assert early["gap_high"] < deep["gap_low"]
    assert (row(found, window="1", contrast="content")[["rows_first", "texts"]] == 60).all()
    places = tables.by_position(points(by_depth=0.1), VARIANCE)
    assert list(places["position"].unique()) == ["64 to 127", "128 to 255", "256 to 511"]
    ends = [row(places, position=p, contrast="content")["gap"] for p in places["position"].unique()]
    assert ends == sorted(ends)


def test_bands_hold_every_row_once_and_shares_are_of_each_kind() -> None:
    given = points(hotter=0.5)
    found = tables.by_band(given, VARIANCE)
    for _, mine in found[found["contrast"] == "content"].groupby("scale"):
        assert mine[["share_first", "share_second"]].sum().tolist() == pytest.approx([1, 1])
    quarters = found[(found["scale"] == "quartile of human rows") & (found["contrast"] == "content")]
    assert quarters["share_first"].tolist() == pytest.approx([0.25] * 4, abs=1e-3)
    assert quarters["share_second"].iloc[-1] > 0.5
    assert quarters["fvu_first"].is_monotonic_decreasing


@pytest.mark.parametrize("worse", [1.0, 1.75])
def test_errors_worse_than_random_ones_are_told_from_errors_as_bad(worse: float) -> None:
    found = tables.effects(points(worse=worse), [HUMAN, DECODED])
    for kind in (HUMAN, DECODED):
        mine = row(found, kind=kind, replaced_by=SPLICED)
        assert mine["times_random_low"] < worse < mine["times_random_high"]
        assert mine["times_random_high"] - mine["times_random_low"] < 0.1
        assert mine["recovered_mean"] == pytest.approx(1 - worse / 30, abs=0.01)
        assert mine["kl_score_zero"] == pytest.approx(1 - worse / 50, abs=0.01)
        assert np.isnan(row(found, kind=kind, replaced_by=MEAN)["recovered_mean"])
        assert row(found, kind=kind, replaced_by=RANDOM)["rows"] == 30 * 223  # the last row has no token after it


def test_what_was_not_replaced_has_no_table() -> None:
    assert tables.effects(points(6, 10), []).empty
    assert tables.effects_by(points(6, 10), []).empty


def test_errors_by_depth_and_entropy_are_of_all_rows() -> None:
    found = tables.effects_by(points(), [DECODED])
    assert found.loc[found["axis"] == "entropy, nats", "rows"].sum() == 30 * 224
    assert found["times_random"].between(1.2, 1.8).all()


def test_short_texts_have_the_windows_that_they_reach() -> None:
    found = tables.by_depth(points(8, 20), VARIANCE)
    assert row(found, window="around 200", contrast="content")["texts"] == 0
    assert np.isnan(row(found, window="around 200", contrast="content")["fvu_first"])
    assert row(found, window="around 8", contrast="content")["texts"] == 8
