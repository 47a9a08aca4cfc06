"""The operations, on numbers that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_probe.errors import ConfigError
from sglang_probe.steering.apply import Bank, Parts, add_rows, changes, intervene
from sglang_probe.steering.plan import rows_of
from tests.steering.toy import NUMBERS, spec

# `up` is along the first axis, `late` unused here, `f7` reads the second axis and writes 2 along the third.
BANK = Bank.of(
    [
        Parts(torch.tensor([5.0, 0.0, 0.0])),
        Parts(torch.tensor([1.0, 1.0, 0.0])),
        Parts(
            torch.tensor([0.0, 0.0, 2.0]),
            encoder=torch.tensor([0.0, 1.0, 0.0]),
            encoder_bias=0.5,
            threshold=1.0,
            decoder_bias=torch.tensor([0.0, 0.25, 0.0]),
        ),
    ]
)


def after(x: list[float], *entries: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[float]:
    """One row, intervened on."""
    x_ND = torch.tensor([[0.0] * 3, x, [0.0] * 3], dtype=dtype)
    passes = rows_of([0, 0, 0], [1, 1, 1], [1, 1, 1], [None, spec(*entries), None], NUMBERS)[1]
    out = intervene(x_ND, passes, BANK)
    assert out.dtype == dtype
    assert out[0].tolist() == out[2].tolist() == [0.0] * 3
    return out[1].tolist()


def test_add_is_by_the_length_that_was_asked_whatever_the_length_of_the_vector() -> None:
    assert after([1, 2, 3], {"strength": 6}) == [7, 2, 3]
    assert after([1, 2, 3], {"vector": "f7", "strength": 6}) == [1, 2, 9]


def test_project_out_takes_a_fraction_of_the_part_along_the_direction() -> None:
    assert after([8, 2, 3], {"op": "project_out", "strength": None}) == [0, 2, 3]
    assert after([8, 2, 3], {"op": "project_out", "strength": 0.25}) == [6, 2, 3]
    assert after([8, 2, 3], {"vector": "f7", "op": "project_out", "strength": 1}) == [8, 2, 0]


def test_a_feature_is_ablated_by_its_own_contribution_and_the_error_stays() -> None:
    # pre = 2 - 0.25 + 0.5 = 2.25 > 1, so 2.25 * 2 is taken from the third axis, which held 10.
    assert after([1, 2, 10], {"vector": "f7", "op": "ablate_feature", "strength": 1}) == [1, 2, 5.5]
    # pre = 0.75: not past the threshold, nothing to take.
    assert after([1, 0.5, 10], {"vector": "f7", "op": "ablate_feature", "strength": 1}) == [1, 0.5, 10]


def test_clamp_sets_the_activation_active_or_not_and_a_gate_leaves_the_inactive_alone() -> None:
    clamp = {"vector": "f7", "op": "clamp", "strength": 4}
    assert after([1, 2, 10], clamp) == [1, 2, 10 + (4 - 2.25) * 2]
    assert after([1, 0.5, 10], clamp) == [1, 0.5, 18]
    assert after([1, 0.5, 10], {**clamp, "gate": {"by": "feature"}}) == [1, 0.5, 10]
    assert after([1, 2, 10], {**clamp, "gate": {"by": "feature"}}) == [1, 2, 13.5]
    assert after([7, 2, 3], {"op": "clamp", "strength": -1}) == [-1, 2, 3]


def test_cap_lowers_what_is_above_and_raises_nothing() -> None:
    assert after([7, 2, 3], {"op": "cap", "strength": 5}) == [5, 2, 3]
    assert after([-7, 2, 3], {"op": "cap", "strength": 5}) == [-7, 2, 3]
    assert after([1, 2, 10], {"vector": "f7", "op": "cap", "strength": 1}) == [1, 2, 7.5]
    assert after([1, 0.5, 10], {"vector": "f7", "op": "cap", "strength": 0}) == [1, 0.5, 10]


def test_each_pass_sees_what_the_one_before_left() -> None:
    add, cap = {"strength": 6}, {"op": "cap", "strength": 5}
    assert after([1, 2, 3], add, cap) == [5, 2, 3]
    assert after([1, 2, 3], cap, add) == [7, 2, 3]


def test_a_row_has_the_bits_that_it_has_alone() -> None:
    torch.manual_seed(0)
    width = 576
    bank = Bank.of(
        [Parts(torch.randn(width)), Parts(torch.randn(width)), Parts(torch.randn(width), torch.randn(width))]
    )
    x_ND = torch.randn(64, width).bfloat16()
    specs = [
        spec({"vector": v, "op": op, "strength": 1}, {})
        for v, op in [("up", "add"), ("up", "project_out"), ("f7", "ablate_feature"), ("f7", "clamp"), ("up", "cap")]
    ]
    given = [specs[i % 5] if i % 3 else None for i in range(64)]
    ones = [1] * 64
    together = intervene(x_ND, rows_of([0] * 64, ones, ones, given, NUMBERS)[1], bank)
    for i, one in enumerate(given):
        alone = intervene(x_ND[i : i + 1], rows_of([0], [1], [1], [one], NUMBERS).get(1, []), bank)
        assert torch.equal(together[i], alone[0])


def test_a_row_that_is_changed_by_nothing_keeps_its_bits() -> None:
    x_ND = torch.tensor([[-0.0, 2.0]])
    add_rows(x_ND, torch.tensor([0]), torch.zeros(1, 2))
    assert torch.signbit(x_ND[0, 0])


def test_a_change_is_rounded_once_to_the_dtype_and_then_added() -> None:
    # bf16 has 8 bits: 1 + 2**-9 is lost, and so is each half of 2**-8 in turn, but not their sum.
    half = {"strength": 2**-9}
    assert after([1, 0, 0], half, dtype=torch.bfloat16) == [1, 0, 0]
    assert after([1, 0, 0], half, {"strength": 2**-9 + 2**-8}, dtype=torch.bfloat16) == [1 + 2**-7, 0, 0]


def test_rows_are_given_with_their_changes_for_a_stream_in_two_tensors() -> None:
    passes = rows_of([0], [3], [3], [spec({"phases": ["prefill"], "prompt_window": [1, 3]})], NUMBERS)[1]
    rows, change = changes(torch.zeros(3, 3), passes, BANK)
    assert rows.tolist() == [1, 2]
    assert change.tolist() == [[2, 0, 0]] * 2


@pytest.mark.parametrize(
    "vectors", [[], [torch.zeros(3)], [torch.tensor([1.0, torch.nan, 0])], [torch.ones(3), torch.ones(4)]]
)
def test_a_bank_of_nothing_of_zero_or_of_two_widths_is_refused(vectors: list[torch.Tensor]) -> None:
    with pytest.raises(ConfigError):
        Bank.of([Parts(v) for v in vectors])
