"""One schedule of keys for several harvests: a row that two of them have is in the same place of the same batch."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.sae.keys import Keyed, KeySchedule, coverage, mixed, places
from sglang_probe.sae.schedule import Schedule

KEYS = pd.DataFrame(
    {"rid": np.repeat(["a", "b"], 20), "position": [*range(20)] * 2, "segment": ["system"] * 10 + ["user"] * 30}
)
X = torch.arange(40.0)[:, None].repeat(1, 3)
WHOLE = Keyed(X, np.arange(40))
HOLES = np.arange(40) % 4 == 1
HOLED = Keyed(X[~HOLES] + 0.25, np.where(HOLES, -1, np.cumsum(~HOLES) - 1))


def test_places_are_found_by_request_and_position_whatever_the_order() -> None:
    shuffled = KEYS.sample(30, random_state=0).reset_index(drop=True)
    at = places(KEYS, shuffled)
    assert (at >= 0).sum() == 30
    assert (
        shuffled.iloc[at[at >= 0]][["rid", "position"]].to_numpy().tolist()
        == KEYS[at >= 0][["rid", "position"]].to_numpy().tolist()
    )
    with pytest.raises(ConfigError, match="two rows of one position"):
        places(KEYS, pd.concat([shuffled, shuffled]))


def test_a_row_that_both_have_is_in_the_same_place_of_both() -> None:
    order = KeySchedule.of(40, [WHOLE, HOLED], seed=3)
    whole, holed = (torch.cat([order.batch(h, s, 8)[:, 0] for s in range(10)]).numpy() for h in (WHOLE, HOLED))
    has = ~HOLES[whole.astype(int)]
    assert (holed[has] == whole[has] + 0.25).all()
    # A hole is filled by a row that both have; the whole harvest gives its own row there.
    assert not HOLES[(holed[~has] - 0.25).astype(int)].any()
    assert sorted(whole[:40]) == list(range(40))


def test_rows_shuffled_by_themselves_would_share_next_to_no_batch() -> None:
    """What the schedule of keys is for: its absence is the effect of another order."""
    alone = Schedule([np.flatnonzero(~HOLES)], [1.0], 3).batch(0, 8)
    shared = KeySchedule.of(40, [WHOLE, HOLED], 3).batch(WHOLE, 0, 8)[:, 0].numpy().astype(int)
    assert set(alone) != set(shared[~HOLES[shared]])


def test_any_batch_can_be_made_without_those_before_it() -> None:
    first, again = (KeySchedule.of(40, [WHOLE, HOLED], seed=3) for _ in range(2))
    late = again.batch(HOLED, 7, 8)
    for step in range(7):
        first.batch(HOLED, step, 8)
    assert torch.equal(first.batch(HOLED, 7, 8), late)


def test_harvests_without_a_common_position_are_refused() -> None:
    others = Keyed(X[HOLES], np.where(HOLES, np.cumsum(HOLES) - 1, -1))
    with pytest.raises(ConfigError, match="no position"):
        KeySchedule.of(40, [HOLED, others], 0)


def test_shares_of_a_mixture_are_nested_and_spread_evenly() -> None:
    n = 4000
    human, decode = (Keyed(torch.full((n, 1), float(v)), np.arange(n)) for v in (0, 1))
    taken = {s: mixed(human, decode, s).rows(np.arange(n))[:, 0].numpy() for s in (0, 0.25, 0.5, 1)}
    assert [round(float(t.mean()), 2) for t in taken.values()] == [0, 0.25, 0.5, 1]
    assert (taken[0.25] <= taken[0.5]).all()
    assert abs(taken[0.25].reshape(40, 100).mean(1) - 0.25).max() <= 0.021
    with pytest.raises(ConfigError, match="same keys"):
        mixed(WHOLE, HOLED, 0.5)


def test_coverage_counts_rows_and_equal_ones_by_segment() -> None:
    same = HOLED.x_ND.clone()
    same[:9] -= 0.25
    frame = coverage(KEYS, {"holed": Keyed(same, HOLED.at_K)}, WHOLE).set_index("segment")
    assert frame.loc["system", ["keys", "rows"]].tolist() == [10, 7]
    assert frame.loc["system", "identical"] == 1
    assert frame.loc["user", "identical"] == pytest.approx(2 / 23)
