"""Static-max oracle: the positions that some decode step will need most."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sglang_probe.eviction.base import Oracle
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register
from sglang_probe.eviction.scoring import value_norms


@register("static_max", source="oracle; weighted by the projected value it is that of arXiv 2602.08585")
class StaticMax(Oracle):
    """Maximum of the full-cache attention over decode steps and query heads: a token read once counts in full."""

    weight: Literal["none", "projected_value"] = "none"
    """`projected_value` multiplies by ‖v W_O‖₁ of the query head before the maximum."""

    def scores(self, layer: Layer) -> Tensor:
        """Largest future weight."""
        a_GRL = layer.future_attention[..., : layer.length].amax(-2)
        if self.weight == "projected_value":
            a_GRL = a_GRL * value_norms(layer, projected=True)
        return a_GRL.amax(-2)
