"""Need-set oracle: the positions that the task is known to need, then the most recent ones."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_probe.eviction.base import Oracle
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register


@register("need_set", source="oracle; synthetic tasks only")
class NeedSet(Oracle):
    """Needed positions first, the rest of the budget by recency. Of more needed positions than budget the later ones
    stay.

    The set must come from knocking tokens out of the trained model: where a fact is stored is not where a human would
    look.
    """

    def scores(self, layer: Layer) -> Tensor:
        """Position, raised above all others where needed."""
        needed = layer.require("needed_L")
        position = torch.arange(layer.length, dtype=torch.float32, device=needed.device)
        score = position + layer.length * needed
        return score[..., None, :].expand(layer.shape_GL)
