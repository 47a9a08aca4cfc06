"""Random eviction: what any scorer must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_probe.eviction.base import Method
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register


@register("random", source="baseline")
class Random(Method):
    """Independent uniform scores per request, layer, kv head and position, from a counter-based generator.

    The draw of an entry depends on these numbers and the seed alone, never on the batch it is scored in.
    """

    seed: int = 0

    def scores(self, layer: Layer) -> Tensor:
        """Uniform in [0, 1), float64."""
        *lead, heads, length = layer.shape_GL
        h = torch.full((1,), self.seed)
        for counter in (layer.request, layer.index):
            h = _mix(h + _mix(counter.reshape(*counter.shape, *[1] * 2)))
        h = _mix(h + _mix(torch.arange(heads)[:, None]))
        h = _mix(h + _mix(torch.arange(length)))
        uniform = _shift(h, 11).to(torch.float64) * 2.0**-53
        return uniform.expand(*lead, heads, length).to(layer.k_LGD.device)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, whose products wrap around (Steele et al., OOPSLA 2014)."""
    x = x + -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, n: int) -> Tensor:
    """Logical right shift."""
    return (x >> n) & ((1 << (64 - n)) - 1)
