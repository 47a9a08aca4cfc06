"""Budgets, ties and always-kept positions, enumerated."""

from __future__ import annotations

import pytest
import torch

from sglang_probe.errors import ProbeError
from sglang_probe.eviction.select import protected_mask, share_out, top_k

NONE = torch.zeros(4, dtype=torch.bool)


def test_of_equal_scores_the_earlier_position_is_kept() -> None:
    keep = top_k(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3, NONE)
    assert keep.tolist() == [True, True, True, False]


def test_budgets_may_differ_by_row_and_exceed_the_length() -> None:
    keep = top_k(torch.tensor([[4.0, 3, 2, 1]] * 3), torch.tensor([0, 2, 9]), NONE)
    assert keep.sum(-1).tolist() == [0, 2, 4]
    assert keep[1].tolist() == [True, True, False, False]


def test_protected_positions_come_before_any_score() -> None:
    keep = top_k(torch.tensor([9.0, 8.0, 7.0, -1e30]), 2, protected_mask(4, sinks=0, recent=1))
    assert keep.tolist() == [True, False, False, True]


def test_a_budget_below_the_protected_set_is_refused_with_advice() -> None:
    with pytest.raises(ProbeError, match="budget of 1 does not hold the 2 protected") as e:
        top_k(torch.zeros(4), 1, protected_mask(4, sinks=1, recent=1))
    assert e.value.fix is not None
    assert "window" in e.value.fix


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ProbeError, match="not finite"):
        top_k(torch.tensor([0.0, bad, 0.0, 0.0]), 2, NONE)


def test_protected_sets_that_overlap_are_counted_once() -> None:
    assert protected_mask(3, sinks=2, recent=2).tolist() == [True, True, True]
    assert protected_mask(5, sinks=1, recent=2).tolist() == [True, False, False, True, True]


def test_largest_remainders_make_the_sum_exact() -> None:
    assert share_out(torch.tensor([1.5, 1.5, 2.0]), torch.tensor(5)).tolist() == [2, 1, 2]
    assert share_out(torch.tensor([0.2, 0.7, 2.1]), torch.tensor(3)).tolist() == [0, 1, 2]
