"""Predictive horizon: failures, censoring, survival and decay."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sglang_probe.errors import ProbeError
from sglang_probe.studies.query_drift.horizon import first_failure, fit_decay, kaplan_meier, median_interval

NAN = np.nan
MEDIAN = 33.9
"""Of an exponential with a mean of 50 times a lognormal with a sigma of 0.4, by four million draws."""


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ([1, 1, -1, -1, 1, -1, -1, -1, 1], (5, True)),  # the first run of three, not the first two
        ([-1, -1, -1], (0, True)),
        ([1, 1, -1, -1], (4, False)),
        ([1, 1], (2, False)),
        ([-1, NAN, -1, -1, -1], (2, True)),
        ([], (0, False)),
    ],
)
def test_a_failure_starts_the_first_run_below_delta(advantage: list[float], expected: tuple[int, bool]) -> None:
    assert first_failure(np.array(advantage), run=3) == expected


def test_delta_shifts_what_counts_as_an_advantage() -> None:
    assert first_failure(np.array([0.3, 0.05, 0.05]), delta=0.1, run=2) == (1, True)
    assert first_failure(np.array([0.3, 0.05, 0.05]), delta=0.0, run=2) == (3, False)


def test_survival_with_censoring_by_hand() -> None:
    # 2 fails, 3 fails and is censored, 5 censored, 7 fails: 4/5, then 3/4, then 0.
    s = kaplan_meier(np.array([2, 3, 3, 5, 7]), np.array([1, 1, 0, 0, 1], dtype=bool))
    assert s.times.tolist() == [2, 3, 7]
    assert s.at_risk.tolist() == [5, 4, 1]
    assert s.survival.tolist() == pytest.approx([0.8, 0.6, 0.0])
    assert s.median == 7


def test_survival_is_that_of_scipy() -> None:
    g = np.random.default_rng(0)
    times, observed = g.integers(0, 20, 60), g.random(60) < 0.6
    ours = kaplan_meier(times, observed)
    reference = stats.ecdf(stats.CensoredData(uncensored=times[observed], right=times[~observed])).sf
    np.testing.assert_allclose(ours.survival, reference.evaluate(ours.times))


def test_treating_the_end_of_a_response_as_a_failure_shortens_the_horizon() -> None:
    g = np.random.default_rng(1)
    failure, end = g.exponential(100, 400), g.exponential(60, 400)
    times, observed = np.minimum(failure, end), failure <= end
    assert kaplan_meier(times, observed).median == pytest.approx(100 * np.log(2), rel=0.25)
    assert kaplan_meier(times, np.ones(400, dtype=bool)).median < 35


def test_the_interval_of_the_median_covers_it_and_is_infinite_where_nothing_fails() -> None:
    g = np.random.default_rng(2)
    times = g.exponential(50, 200)
    low, high = median_interval(times, np.ones(200, dtype=bool))
    assert low < 50 * np.log(2) < high
    assert high - low < 35
    assert median_interval(times, np.zeros(200, dtype=bool)) == (np.inf, np.inf)


def test_responses_of_one_family_count_as_one_and_five_families_have_no_interval() -> None:
    g = np.random.default_rng(3)
    times = g.exponential(50, 8).repeat(10)
    families = np.arange(8).repeat(10)
    low, high = median_interval(times, np.ones(80, dtype=bool), families)
    apart = median_interval(times, np.ones(80, dtype=bool))
    assert low <= apart[0]
    assert high >= apart[1]
    assert high - low > apart[1] - apart[0]
    assert np.isnan(median_interval(times[:50], np.ones(50, dtype=bool), families[:50])).all()


def test_the_interval_of_the_median_covers_as_often_as_it_says() -> None:
    g = np.random.default_rng(4)
    covered = 0
    for _ in range(300):
        level = g.lognormal(0, 0.4, 12).repeat(8)  # responses of a family are alike
        failure, end = g.exponential(50, 96) * level, g.exponential(150, 96)
        low, high = median_interval(np.minimum(failure, end), failure <= end, np.arange(12).repeat(8))
        covered += low <= MEDIAN <= high
    assert covered / 300 >= 0.91  # 0.95 less three standard errors


def test_a_decay_is_recovered_with_missing_steps() -> None:
    t = np.arange(80)
    y = 0.2 + 0.5 * np.exp(-t / 12)
    y[[3, 40]] = NAN
    fit = fit_decay(y)
    assert (fit.start, fit.limit, fit.time) == pytest.approx((0.7, 0.2, 12.0), rel=1e-2)
    assert fit.half_life == pytest.approx(12 * np.log(2), rel=1e-2)
    assert fit.residual < 1e-3


def test_too_little_data_is_refused() -> None:
    with pytest.raises(ProbeError, match="3 steps"):
        fit_decay(np.array([1.0, 0.5, NAN, 0.2]))
    with pytest.raises(ProbeError, match="no survival curve"):
        kaplan_meier(np.empty(0), np.empty(0))
