"""False alarms stay at their level without a change, and a planted change is found."""

from __future__ import annotations

import importlib.util

import numpy as np
import pandas as pd
import pytest

from sglang_probe.monitor.adwin import adwin_alarms
from sglang_probe.monitor.alarms import Judge, alarms, drift_log
from sglang_probe.monitor.conformal import e_values, first_alarm, p_values, sequential_p_values, shiryaev_roberts

STREAMS, LENGTH = 10_000, 150


def alarmed(stream: np.ndarray, reference: np.ndarray, rate: float) -> np.ndarray:
    return first_alarm(shiryaev_roberts(e_values(sequential_p_values(stream, reference))), rate)


def test_a_p_value_is_the_rank_among_the_reference_and_itself() -> None:
    assert p_values(np.array([0.0, 2.0, 2.5, 9.0, np.nan]), np.array([3.0, 1.0, 2.0])).tolist() == [
        1,
        0.75,
        0.5,
        0.25,
        1,
    ]


def test_a_sequential_p_value_counts_the_reference_and_what_came_before() -> None:
    found = sequential_p_values(np.array([[5.0, 4.0, 6.0]]), np.array([[4.0, 9.0]]))
    assert found.tolist() == [[2 / 3, 4 / 4, 2 / 5]]


def test_the_mean_of_e_values_is_at_most_one_for_every_size_of_reference() -> None:
    for n in (1, 5, 50, 1000):
        p = np.arange(1, n + 2) / (n + 1)
        assert e_values(p).mean() <= 1
    # The integral of each part from d to 1 is 1 - d^k.
    grid = np.linspace(0.01, 1, 1_000_001)
    whole = np.mean([1 - 0.01**k for k in np.arange(1, 10) / 10])
    assert np.trapezoid(e_values(grid), grid) == pytest.approx(whole, abs=1e-3)


def test_single_trajectories_alarm_falsely_at_most_at_their_share() -> None:
    rng = np.random.default_rng(0)
    hits = [(p_values(x[0], x[1:]) <= 0.05) for x in rng.standard_normal((STREAMS, 60))]
    assert np.mean(hits) <= 0.05 + 3 * (0.05 * 0.95 / STREAMS) ** 0.5
    assert np.mean(hits) >= 0.03


def test_sequential_p_values_are_independent_and_those_of_a_fixed_reference_are_not() -> None:
    """What the level of the detector rests on. The mean of T independent uniform ranks varies by 1/(12 T); ranks in one
    reference of n share its position, and vary by 1/(12 n) more."""
    rng = np.random.default_rng(2)
    n, streams = 20, 4000
    stream, reference = rng.standard_normal((streams, LENGTH)), rng.standard_normal((streams, n))
    alone = 1 / (12 * LENGTH)
    sequential = sequential_p_values(stream, reference).mean(1)
    fixed = np.array([p_values(x, r).mean() for x, r in zip(stream, reference, strict=True)])
    assert sequential.var() == pytest.approx(alone, rel=0.1)
    assert fixed.var() == pytest.approx(alone + 1 / (12 * n), rel=0.15)
    assert (sequential_p_values(stream, reference) <= 0.1).mean() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("n", [20, 100])
def test_ten_thousand_streams_without_a_change_alarm_falsely_at_most_at_the_nominal_rate(n: int) -> None:
    rng = np.random.default_rng(1)
    stream, reference = rng.standard_normal((STREAMS, LENGTH)), rng.standard_normal((STREAMS, n))
    rate = 0.002
    nominal = rate * LENGTH
    found = (alarmed(stream, reference, rate) >= 0).mean()
    assert 0 < found <= nominal


def test_ranks_that_leave_the_score_itself_out_would_alarm_too_often() -> None:
    """The control: without the one that is added to both counts, the test above fails."""
    rng = np.random.default_rng(1)
    stream, reference = rng.standard_normal((2000, LENGTH)), rng.standard_normal((2000, 100))
    places = 100 + np.arange(LENGTH)
    wrong = (sequential_p_values(stream, reference) * (places + 1) - 1) / places
    rate = 0.002
    assert (first_alarm(shiryaev_roberts(e_values(np.maximum(wrong, 1e-12))), rate) >= 0).mean() > rate * LENGTH


def test_a_planted_shift_is_found_soon() -> None:
    rng = np.random.default_rng(3)
    stream, reference = rng.standard_normal((1000, LENGTH)), rng.standard_normal((1000, 100))
    stream[:, 50:] += 1.0
    at = alarmed(stream, reference, 0.002)
    assert (at >= 50).mean() > 0.9
    assert np.median(at[at >= 50]) < 50 + 40


def made(shift_from: int | None, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(seed)
    names = ["a mean", "b mean"]
    scores, reference = (pd.DataFrame(np.abs(rng.standard_normal((n, 2))), columns=names) for n in (120, 400))
    if shift_from is not None:
        scores.loc[shift_from:, "b mean"] += 2
    return scores, reference


def test_the_drift_log_names_segment_and_statistic_of_a_planted_drift() -> None:
    found = alarms(*made(60, 0), share=0.02, rate=0.001)
    log, events = drift_log(found, pd.Series(np.repeat(["one", "two", "three"], 40)), 0.02)
    assert log["trajectories"].tolist() == [40, 40, 40]
    assert not log["drift"][0]
    assert events[["event", "segment", "statistic"]].values.tolist() == [["retrain", "two", "b mean"]]
    assert 60 <= events["place"][0] < 80
    assert log["alarms"][2] > log["expected_at_most"][2]


def test_several_statistics_share_the_rates() -> None:
    rng = np.random.default_rng(5)
    single = drift = total = 0
    for _ in range(150):
        both = rng.standard_normal((150, 20))
        frame = pd.DataFrame(both, columns=[f"s{i}" for i in range(20)])
        found = alarms(frame[100:].reset_index(drop=True), frame[:100], share=0.25, rate=0.01)
        single += int(found.trajectories["alarm"].sum())
        total += len(found.trajectories)
        drift += bool(found.drift["first_alarm"].notna().any())
    assert single / total <= 0.25
    assert drift / 150 <= 0.01 * 50


@pytest.mark.skipif(importlib.util.find_spec("river") is None, reason="river is not installed")
def test_adwin_finds_a_planted_shift_too() -> None:
    rng = np.random.default_rng(4)
    values = np.concatenate([rng.standard_normal(300), 3 + rng.standard_normal(300)])
    found = adwin_alarms(values)
    assert found
    assert 300 <= found[0] < 400


def test_judging_one_after_the_other_is_judging_all_at_once_and_begins_anew_after_the_longest_stream() -> None:
    rng = np.random.default_rng(3)
    reference, stream = rng.integers(0, 9, (30, 2)).astype(float), rng.integers(0, 12, (50, 2)).astype(float)
    stream[7, 0] = np.nan
    judge = Judge(reference, share=0.1, rate=0.01)
    told = [judge.judge(x) for x in stream]
    p = sequential_p_values(stream.T, reference.T)
    assert np.allclose(np.array([v.p_S for v in told]).T, p)
    assert np.allclose(np.array([v.level_S for v in told]).T, shiryaev_roberts(e_values(p)) * 0.01 / 2)
    short = Judge(reference, share=0.1, rate=0.01, longest=20)
    again = [short.judge(x) for x in stream]
    assert np.array_equal([v.level_S for v in again[:20]], [v.level_S for v in told[:20]])
    fresh = Judge(reference, share=0.1, rate=0.01)
    assert np.array_equal([v.level_S for v in again[20:40]], [fresh.judge(x).level_S for x in stream[20:40]])
