"""Distances of rows, exactly."""

from __future__ import annotations

import math

import torch

from sglang_probe.stats.distance import row_distance


def test_identical_rows_have_distance_exactly_zero_and_cosine_exactly_one() -> None:
    x = torch.randn(50, 7).to(torch.bfloat16)
    l2, cosine, deviation = row_distance(x, x.clone())
    assert (l2 == 0).all()
    assert (deviation == 0).all()
    assert (cosine == 1).all()


def test_relative_l2_is_measured_against_the_reference() -> None:
    a, b = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    l2, cosine, deviation = row_distance(a[1:], b[1:])
    assert deviation[0] == 2.0
    assert l2[0] == math.sqrt(5) / 2
    assert cosine[0] == 0.0
    assert row_distance(a[:1], b[:1])[0][0] > 1e300  # against a zero row: huge, not NaN


def test_one_flipped_bit_in_bf16_is_not_identical() -> None:
    x = torch.randn(4, 8).to(torch.bfloat16)
    y = x.clone()
    y.view(torch.int16)[2, 3] ^= 1
    l2, _, _ = row_distance(x, y)
    assert (l2 > 0).tolist() == [False, False, True, False]
