"""A share of a short prompt can be less than one position."""

from __future__ import annotations

from fractions import Fraction

import torch

from sglang_probe.attention.weights import AttentionSpec
from sglang_probe.errors import ProbeError
from sglang_probe.eviction import Layer, parse_method
from sglang_probe.studies.evict.offline import _selections


def test_less_than_one_position_is_left_out_with_its_reason() -> None:
    layer = Layer(q_NHD=torch.randn(16, 4, 8), k_LGD=torch.randn(16, 2, 8), spec=AttentionSpec(scaling=8**-0.5))
    for name in ("h2o", "knorm"):
        (_, none), (_, some) = _selections(parse_method(name), layer, [Fraction(1, 64), Fraction(1, 4)])
        assert isinstance(none, ProbeError)
        assert "less than one of 16 positions" in none.message
        assert not isinstance(some, ProbeError)
