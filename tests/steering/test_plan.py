"""Positions of a forward pass to its rows."""

from __future__ import annotations

import numpy as np

from sglang_probe.steering.plan import OPS, rows_of
from tests.steering.toy import NUMBERS, spec


def test_only_rows_at_the_asked_positions_are_changed_whatever_shares_the_forward() -> None:
    # A chunk [4, 8) of a prompt of 10, a plain prompt of 3, a decode step at position 12 of a prompt of 12.
    found = rows_of(
        [4, 0, 12],
        [8, 3, 13],
        [10, 3, 12],
        [spec({"phases": ["prefill"], "prompt_window": [6, None]}), None, spec({"phases": ["decode"], "strength": 5})],
        NUMBERS,
    )
    (only,) = found[1]
    assert found.keys() == {1}
    assert only.row.tolist() == [2, 3, 7]
    assert only.vector.tolist() == [1, 1, 1]
    assert only.amount.tolist() == [2, 2, 5]
    assert only.amount.dtype == np.float32


def test_several_interventions_of_one_layer_are_passes_in_their_order_and_layers_are_apart() -> None:
    one = spec({"op": "clamp"}, {"vector": "late"}, {"strength": 3})
    found = rows_of([0, 0], [2, 1], [2, 1], [one, spec({})], NUMBERS)
    assert [OPS[i] for i in found[1][0].op] == ["clamp", "clamp", "add"]
    assert found[1][0].row.tolist() == [0, 1, 2]
    assert found[1][1].row.tolist() == [0, 1]
    assert found[2][0].vector.tolist() == [2, 2]


def test_a_step_that_acts_on_none_of_the_positions_takes_no_turn() -> None:
    one = spec({"phases": ["decode"]}, {"phases": ["prefill"], "strength": 4})
    (only,) = rows_of([0], [3], [3], [one], NUMBERS)[1]
    assert only.amount.tolist() == [4, 4, 4]
    assert rows_of([0], [3], [3], [spec({"phases": ["decode"]})], NUMBERS) == {}


def test_chunks_and_steps_together_change_what_one_forward_would() -> None:
    one = spec({"exclude": [2, 5], "prompt_window": [1, 7], "generation_window": [2, 4]})
    whole = rows_of([0], [14], [10], [one], NUMBERS)[1][0].row.tolist()
    assert whole == [1, 3, 4, 6, 11, 12]
    pieces = [(0, 3), (3, 6), (6, 10), (10, 11), (11, 12), (12, 13), (13, 14)]
    found = [
        start + int(r)
        for start, end in pieces
        for passes in rows_of([start], [end], [10], [one], NUMBERS).values()
        for r in passes[0].row
    ]
    assert found == whole
