"""Knorm: keys of small norm receive large attention."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_probe.eviction.base import Method
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register


@register("knorm", source="arXiv 2406.11430")
class Knorm(Method):
    """Keep the keys of smallest L2 norm. Norms are taken in float32 or better: in bf16 most of them tie."""

    def scores(self, layer: Layer) -> Tensor:
        """Minus the norm of the key."""
        dtype = torch.promote_types(layer.k_LGD.dtype, torch.float32)
        return -torch.linalg.vector_norm(layer.k_LGD, dim=-1, dtype=dtype).mT
