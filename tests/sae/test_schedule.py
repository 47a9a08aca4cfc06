"""In which order an SAE is trained on rows."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_probe.errors import ConfigError
from sglang_probe.sae.schedule import Schedule, schedule
from tests.sae.test_harvested import made


def test_every_epoch_has_each_row_once_in_another_order() -> None:
    order = Schedule([np.arange(10)], [1.0], seed=3)
    epochs = [np.concatenate([order.batch(2 * e, 5), order.batch(2 * e + 1, 5)]) for e in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3


def test_every_batch_is_full_across_the_end_of_an_epoch() -> None:
    order = Schedule([np.arange(10)], [1.0], seed=3)
    assert [len(order.batch(s, 7)) for s in range(5)] == [7] * 5
    assert len(order.batch(1, 25)) == 25


def test_phases_of_one_length_have_orders_of_their_own() -> None:
    batch = Schedule([np.arange(50), np.arange(50, 100)], [0.5, 0.5], seed=3).batch(0, 100)
    first, second = batch[batch < 50], batch[batch >= 50] - 50
    assert sorted(first) == sorted(second)
    assert first.tolist() != second.tolist()


def test_a_batch_does_not_depend_on_the_batches_before_it() -> None:
    one, other = (Schedule([np.arange(10)], [1.0], seed=3) for _ in range(2))
    in_turn = [one.batch(s, 7) for s in range(6)]
    assert other.batch(5, 7).tolist() == in_turn[5].tolist()
    assert one.batch(2, 25).tolist()[:20] == np.concatenate([one.batch(5, 10), one.batch(6, 10)]).tolist()


def test_a_mixture_has_its_shares_in_every_stretch_and_one_order_of_each_phase() -> None:
    rows = made(40)
    prefill = rows.tokens["phase"].to_numpy() == "prefill"
    arms = {q: schedule(rows, {"prefill": 1 - q, "decode": q}, seed=0) for q in (0.25, 0.5)}
    orders = {}
    for q, arm in arms.items():
        batch = arm.batch(0, 40)
        assert (~prefill[batch]).sum() == pytest.approx(40 * q, abs=1)
        orders[q] = [i for i in batch if prefill[i]]
    shorter = min(map(len, orders.values()))
    assert orders[0.25][:shorter] == orders[0.5][:shorter]
    assert arms[0.5].epoch_length == 160  # as many as the scarcer phase, 80 rows, allows


def test_a_mixture_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"sum to 0\.5"):
        schedule(made(), {"prefill": 0.5}, 0)
    with pytest.raises(ConfigError, match="recompute"):
        schedule(made(), {"prefill": 0.5, "recompute": 0.5}, 0)
