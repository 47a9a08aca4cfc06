"""KeyDiff: keep the keys that differ from the typical key."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sglang_probe.eviction.base import Method
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register


@register("keydiff", source="arXiv 2504.15364")
class KeyDiff(Method):
    """Score minus the cosine between a post-RoPE key and the mean of the normalised keys, in one pass over the prompt.

    The paper evicts block by block; that is a matter of when keys arrive, not of this score.
    """

    def scores(self, layer: Layer) -> Tensor:
        """Minus the cosine to the mean direction."""
        k = layer.k_LGD.to(torch.promote_types(layer.k_LGD.dtype, torch.float32))
        anchor = functional.normalize(k, dim=-1).mean(-3, keepdim=True)
        return -functional.cosine_similarity(k, anchor, dim=-1).mT
