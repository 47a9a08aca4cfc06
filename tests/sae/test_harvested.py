"""Which rows an SAE is trained on and judged by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.run.run import Run
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.harvested import Harvested, Listed, harvested, seen_before
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
