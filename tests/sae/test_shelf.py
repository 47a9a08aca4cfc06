"""Rows that stay in their runs: the same batches when all fits, each row once an epoch and no more memory when not."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from sglang_probe.errors import RunDirectoryError
from sglang_probe.run import batches as batches_of_run
from sglang_probe.run import shards
from sglang_probe.run.run import Run
from sglang_probe.sae.evaluation import Sinks
from sglang_probe.sae.harvested import harvested, listed
from sglang_probe.sae.schedule import Schedule, schedule
from sglang_probe.sae.shelf import Shelf
from sglang_probe.sae.train import norm_scale
from tests.sae.made_rows import POINT, Text, make_run_of
from tests.verify.good_run import RESID, make_good_run

TEXTS, LENGTH = 12, 24


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    rng = np.random.default_rng(0)
    texts = [Text([*range(LENGTH - 8)], [1] * 8, rng.normal(size=(LENGTH - 1, 5))) for _ in range(TEXTS)]
    return make_run_of(tmp_path_factory.mktemp("shelf") / "run", texts)


def batches(shelf: Shelf, steps: int, size: int) -> list[torch.Tensor]:
    return [shelf.batch(step, size) for step in range(steps)]


def test_what_is_listed_and_read_is_what_is_harvested(tmp_path: Path) -> None:
    run = make_good_run(tmp_path)
    for how in ({}, {"weight": "traffic", "sinks": Sinks(2, 1.2)}, {"where": "phase == 'decode'", "deduplicate": 2}):
        rows, there = listed([run, run], RESID, **how), harvested([run, run], RESID, **how)  # type: ignore[arg-type]
        expected = [run.rows(RESID, [row])[0] for row in there.tokens["row"]]
        assert torch.equal(there.x_ND, torch.stack(expected))
        mixed = np.random.default_rng(0).integers(0, len(rows), 100)
        assert torch.equal(rows.read(mixed), there.x_ND[torch.from_numpy(mixed)])
        assert torch.equal(torch.cat(list(rows.batches())), there.x_ND.float())
        assert rows.loaded().tokens.equals(there.tokens)
        assert rows.tokens.memory_usage(index=False).sum() < 40 * len(rows) + 8 * 1024


@pytest.mark.parametrize("weight", ["unique", "traffic"])
def test_positions_that_are_chosen_in_parts_are_those_that_are_chosen_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str
) -> None:
    run = make_good_run(tmp_path)
    how = {"where": None, "weight": weight, "rng": np.random.default_rng(0)}
    whole = batches_of_run.chosen(run, RESID, **how)  # type: ignore[arg-type]
    monkeypatch.setattr(batches_of_run, "_PART", 10)
    parts = list(batches_of_run.chosen_in_parts(run, RESID, **how))  # type: ignore[arg-type]
    assert len(parts) > 2
    columns = ["rid", "position", "token_id", "segment", "phase", "row"]
    together = pd.concat([part[columns] for part in parts], ignore_index=True)
    pd.testing.assert_frame_equal(together, whole[columns].reset_index(drop=True))


def test_a_buffer_that_holds_everything_changes_no_batch(run: Run) -> None:
    rows, whole = listed([run], POINT), harvested([run], POINT)
    plain = schedule(whole, None, 3)
    for together in (None, len(rows), len(rows) + 1):
        shelf = Shelf(rows, schedule(rows, None, 3, together))
        for step, batch in enumerate(batches(shelf, 30, 32)):
            assert torch.equal(batch, whole.x_ND[torch.from_numpy(plain.batch(step, 32))].float()), step
        assert shelf.reads == 1


def test_of_more_rows_each_comes_once_an_epoch_and_the_buffer_holds_no_more_than_it_may(run: Run) -> None:
    rows = listed([run], POINT)
    order = schedule(rows, None, 3, 50)
    lengths = np.diff([0, *order.ends])
    assert lengths.sum() == len(rows) == order.epoch_length
    assert lengths.max() <= 50 < len(rows)
    shelf = Shelf(rows, order)
    held = []
    for epoch in range(2):
        assert sorted(order.epoch(epoch)) == list(range(len(rows)))
    found = []
    for step in range(2 * len(rows) // 22):
        found.append(shelf.batch(step, 22))
        assert shelf._x_ND is not None
        held.append(len(shelf._x_ND))
    assert max(held) <= 50
    # Whatever is held, the rows are those of the order.
    every = np.concatenate([order.epoch(0), order.epoch(1)])[: 22 * len(found)]
    assert torch.equal(torch.cat(found), rows.read(every).float())
    # Any batch can be had without those before it, as a training that was interrupted needs.
    assert torch.equal(Shelf(rows, order).batch(len(found) - 1, 22), found[-1])


def test_fills_are_of_pieces_from_all_over_and_keep_the_mixture(run: Run) -> None:
    rows = listed([run], POINT)
    phase = np.where(np.arange(len(rows)) % 3 == 0, "decode", "prefill")
    rows = replace(rows, tokens=rows.tokens.assign(phase=phase))
    order = schedule(rows, {"prefill": 0.5, "decode": 0.5}, 3, 40)
    start = 0
    for end in order.ends:
        part = order.epoch(0)[start:end]
        assert end - start <= 40
        assert (phase[part] == "decode").mean() == pytest.approx(0.5, abs=0.04)
        assert part.max() - part.min() > len(rows) / 2
        start = end
    assert len(set(order.epoch(0))) == order.epoch_length
    assert len({tuple(order.epoch(e)[: order.ends[0]]) for e in range(3)}) == 3


def test_a_mixture_that_fits_although_its_rows_do_not_is_one_fill() -> None:
    order = Schedule([np.arange(90), np.arange(90, 100)], [0.5, 0.5], 0, together=30)
    assert order.ends == [20]
    assert sorted(order.epoch(0)[order.epoch(0) >= 90]) == list(range(90, 100))


def test_the_scale_does_not_depend_on_how_rows_are_cut() -> None:
    x = torch.randn(999, 7)
    assert len({norm_scale(x.split(n)) for n in (1, 10, 999)}) == 1  # type: ignore[no-untyped-call]


def test_reading_takes_the_memory_of_what_is_read(tmp_path: Path) -> None:
    save_file({"rows": torch.arange(40_000.0).reshape(10_000, 4)}, tmp_path / "shard.safetensors")
    places = np.random.default_rng(0).permutation(10_000)[:100]
    out = torch.zeros(100, 4)
    shards.read_into(tmp_path / "shard.safetensors", places[:1], out, np.zeros(1, np.int64))  # the header is kept
    tracemalloc.start()
    shards.read_into(tmp_path / "shard.safetensors", places, out, np.arange(100))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert torch.equal(out[:, 0], torch.from_numpy(places * 4).float())
    assert most < 50_000  # the file has 160,000 bytes


@pytest.mark.parametrize("cut", [1, 3000])
def test_a_shard_that_ends_early_is_said_by_name(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "shard.safetensors"
    save_file({"rows": torch.zeros(1000, 4)}, path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(RunDirectoryError, match=r"shard\.safetensors is damaged: it ends within a row"):
        shards.read_into(path, np.array([999]), torch.zeros(1, 4), np.array([0]))
    with pytest.raises(RunDirectoryError, match="damaged"):
        shards.read_into(path, np.array([1000]), torch.zeros(1, 4), np.array([0]))
