"""Which rows an SAE is trained on and judged by, and in which order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.harvested import Harvested, Listed, Schedule, harvested, schedule, seen_before
from tests.verify.good_run import RESID, make_good_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_good_run(tmp_path_factory.mktemp("good"))


EVERYTHING = Sinks(first_positions=0, norm_multiple=None)


def test_rows_are_those_of_their_positions(run: Run) -> None:
    rows = harvested([run], RESID, sinks=EVERYTHING)
    for rid, mine in rows.tokens.groupby("rid"):
        whole = run.activations(str(rid), RESID)
        assert torch.equal(rows.x_ND[torch.tensor(mine.index)], whole[torch.tensor(mine["position"].to_numpy())])
    assert len(rows) == sum(len(b) for b in run.iter_batches(RESID, batch_size=7))


def test_weights_repeat_rows_as_iter_batches_does(run: Run) -> None:
    rows = harvested([run], RESID, weight="traffic", sinks=EVERYTHING)
    theirs = torch.cat(list(run.iter_batches(RESID, batch_size=7, weight="traffic", shuffle=False)))
    assert torch.equal(rows.x_ND, theirs)
    assert len(rows) > len(harvested([run], RESID, sinks=EVERYTHING))


def test_sinks_are_left_out_and_counted_by_reason(run: Run) -> None:
    every = harvested([run], RESID, sinks=EVERYTHING)
    norms = every.x_ND.float().norm(dim=1)
    # The median of what is not at a first position, so that some rows are above and some are not.
    rows = harvested([run], RESID, sinks=Sinks(first_positions=2, norm_multiple=1.2))
    inner = every.tokens["position"].to_numpy() >= 2
    limit = 1.2 * float(np.median(norms.numpy()[inner]))
    assert rows.norm_limit == pytest.approx(limit)
    assert rows.tokens["position"].min() == 2
    assert float(rows.x_ND.float().norm(dim=1).max()) <= limit
    counted = rows.left_out.groupby("reason")["rows"].sum()
    assert counted["first position"] == (~inner).sum()
    assert counted["norm"] == (norms.numpy()[inner] > limit).sum() > 0
    assert len(rows) + counted.sum() == len(every)


def test_two_runs_are_read_one_after_the_other(run: Run) -> None:
    one, two = harvested([run], RESID), harvested([run, run], RESID)
    assert torch.equal(two.x_ND, torch.cat([one.x_ND, one.x_ND]))
    assert two.tokens["run"].unique().tolist() == [0, 1]


def test_runs_of_other_weights_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="different weights"):
        harvested([run, make_good_run(tmp_path, seed=1)], RESID)


def frame(ids: list[int], rid: str = "a", start: int = 0) -> pd.DataFrame:
    return pd.DataFrame({"run": 0, "rid": rid, "position": np.arange(start, start + len(ids)), "token_id": ids})


def test_a_position_whose_last_tokens_were_seen_is_told() -> None:
    tokens = pd.concat([frame([1, 2, 3, 4, 1, 2, 3, 9]), frame([2, 3, 4, 5], "b")])
    # In `a` 1 2 3 comes again; in `b` 2 3 4 was in `a`. The first two positions of a request are too short to tell.
    assert seen_before(tokens, 3).tolist() == [*[False] * 6, True, False, False, False, True, False]


def test_neither_gaps_nor_unknown_ids_nor_the_order_of_tokens_make_a_repeat() -> None:
    assert not seen_before(pd.concat([frame([1, 2, 3]), frame([3, 2, 1], "b")]), 3).any()
    gap = pd.concat([frame([1, 2, 3]), frame([1, 2], "b"), frame([3], "b", start=5)])
    assert not seen_before(gap, 3).any()
    assert not seen_before(pd.concat([frame([-1, -1, -1]), frame([-1, -1, -1], "b")]), 3).any()
    assert not seen_before(frame([1]), 3).any()


def made(families: int = 10, each: int = 5) -> Harvested:
    n = families * each
    tokens = pd.DataFrame(
        {
            "family": np.repeat([f"f{i}" for i in range(families)], each),
            "phase": np.where(np.arange(n) % each < 3, "prefill", "decode"),
        }
    )
    return Harvested(torch.arange(n)[:, None].float(), tokens, pd.DataFrame(), 1.0)


def test_whole_families_are_held_out_and_always_the_same() -> None:
    train, held = made().split(0.3)
    assert held.tokens["family"].nunique() == 3
    assert not set(train.tokens["family"]) & set(held.tokens["family"])
    assert len(train) + len(held) == 50
    assert torch.equal(made().split(0.3)[1].x_ND, held.x_ND)


def test_at_least_one_family_is_held_out_and_one_family_cannot_be_split() -> None:
    assert made(3).split(0.01)[1].tokens["family"].nunique() == 1
    assert made(3).split(0.99)[0].tokens["family"].nunique() == 1
    with pytest.raises(ConfigError, match="one family"):
        made(1).split(0.5)


def test_fewer_rows_are_of_fewer_families_and_among_those_of_a_larger_number() -> None:
    tokens = made().tokens  # 10 families of 5 rows
    whole = Listed([], RESID, tokens.assign(row=np.arange(len(tokens))), pd.DataFrame(), 1.0)
    few, more = (whole.at_most(n).tokens for n in (12, 24))
    assert (len(few), len(more)) == (12, 24)
    assert sorted(few["family"].value_counts()) == [2, 5, 5]
    assert set(few["row"]) < set(more["row"])
    assert few["row"].is_monotonic_increasing
    assert whole.at_most(1000).tokens.equals(whole.tokens)


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
