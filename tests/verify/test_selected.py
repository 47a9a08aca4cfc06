"""Runs that keep some positions only: what their readers say, and what `verify` notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_probe.attention.from_run import _whole_groups
from sglang_probe.errors import ProbeError, RunDirectoryError
from sglang_probe.run.run import Run
from sglang_probe.run.selection import RowsConfig
from sglang_probe.verify.selected import held_as_selected
from sglang_probe.verify.verify import verify
from tests.made_run import EMBEDDING, QUERY

KEY = "blocks.0.attn.hook_rot_k"
WINDOW = RowsConfig.model_validate({"window": 2, "decode": {"every": 2}, "at": {"hook_embed": {}}})


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Run:
    """Queries of the last two prompt positions and of every other decode step; embeddings of everything."""
    return make_run(rows=WINDOW)


def test_every_invariant_holds(run: Run) -> None:
    checks = verify(run, embedding=EMBEDDING)
    assert [str(c) for c in checks if not c.holds and c.name != "content"] == []
    assert {c.name: c.covered for c in checks}["selection"] == 12 + 2 + 1 + 2 + 1


def test_rows_come_by_their_number_and_others_are_not_there(run: Run) -> None:
    tokens = run.tokens_of("a")
    rows = tokens["row"].to_numpy()
    held = run.holds(QUERY, rows)
    assert tokens["position"][held].tolist() == [4, 5, 6]
    assert run.rows(QUERY, rows[held][::-1])[:, 0].tolist() == [6, 5, 4]
    assert run.holds("hook_embed", rows).all()
    with pytest.raises(RunDirectoryError, match=r"1 of the asked rows .* do not exist or were not selected"):
        run.rows(QUERY, rows[[4, 0]])


def test_a_reused_position_whose_origin_was_not_selected_is_said_to_be_that(run: Run) -> None:
    with pytest.raises(RunDirectoryError, match=r"4 of 7 positions have no row .*: 4 not selected \(.*position 0\)"):
        run.activations("b", QUERY)
    filled = run.activations("b", QUERY, missing="nan")
    assert torch.isnan(filled[:4]).all()
    assert filled[4:, 0].tolist() == [4, 5, 6]
    assert run.activations("b", QUERY, first=4)[:, 0].tolist() == [4, 5, 6]
    assert not torch.isnan(run.activations("b", "hook_embed").float()).any()


def test_batches_hold_selected_rows_only(run: Run) -> None:
    for weight, expected in (("unique", [4, 4, 5, 5, 6, 6]), ("traffic", [4, 4, 5, 5, 6, 6])):
        (batch,) = run.iter_batches(QUERY, batch_size=99, weight=weight)
        assert sorted(batch[:, 0].tolist()) == expected


def test_content_is_asked_of_selected_rows(make_run: Callable[..., Run]) -> None:
    run = make_run(rows=RowsConfig.model_validate({"window": 2, "decode": "none"}))
    (content,) = [c for c in verify(run, embedding=EMBEDDING) if c.name == "content"]
    assert (content.name, content.holds, content.covered) == ("content", True, 4)


@pytest.mark.parametrize("wrong", ["another row", "one fewer", "one more"])
def test_a_row_that_was_not_selected_or_is_missing_is_noticed(run: Run, wrong: str) -> None:
    (shard,) = (run.path / "rows" / QUERY).iterdir()
    tensors = load_file(shard)
    index, rows = tensors["index"], tensors["rows"]
    if wrong == "another row":
        index[0] -= 1
    elif wrong == "one fewer":
        index, rows = index[1:], rows[1:]
    else:
        index, rows = torch.cat([torch.tensor([0]), index]), torch.cat([rows[:1], rows])
    copy = Path(run.path)
    save_file({"rows": rows.contiguous(), "index": index.contiguous()}, shard)
    check = held_as_selected(Run(_elsewhere(copy)))
    assert check.violation is not None
    assert QUERY in check.violation


def _elsewhere(path: Path) -> Path:
    """The same run under another name: shards are remembered by theirs."""
    return path.rename(path.with_name("moved"))


def test_a_run_without_a_selection_has_no_index(make_run: Callable[..., Run]) -> None:
    run = make_run()
    (shard,) = (run.path / "rows" / QUERY).iterdir()
    assert set(load_file(shard)) == {"rows"}
    assert np.array_equal(next(run.iter_shards(QUERY))[0], np.arange(12))


@pytest.mark.parametrize(
    ("queries", "keys", "whole"), [([2, 3], [1], True), ([0, 3], [1], False), ([0, 1], [1], False)]
)
def test_a_layer_needs_whole_groups_of_heads(
    make_run: Callable[..., Run], queries: list[int], keys: list[int], whole: bool
) -> None:
    run = make_run()
    run.manifest["heads"] = {QUERY: [2, 2], KEY: [1, 2]}
    run.manifest["head_numbers"] = {QUERY: queries, KEY: keys}
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    if whole:
        assert _whole_groups(run, 0, config) == queries
    else:
        with pytest.raises(ProbeError, match="2 query heads share a kv head"):
            _whole_groups(run, 0, config)
