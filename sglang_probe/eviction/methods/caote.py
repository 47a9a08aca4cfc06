"""CAOTE: the change of the attention output when a position is removed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sglang_probe.errors import ProbeError
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register
from sglang_probe.eviction.wrapper import Wrapper


@register("caote", source="arXiv 2504.14051")
class CAOTE(Wrapper):
    """Score `a / (1 - a) · ‖o - v‖`, with a the base's scores normalised over the prompt.

    The formula is exact for one query and one removed key; with pooled or summed scores as weights it is the paper's
    heuristic. `output: mean` replaces the weighted mean o by the plain mean of the values (FastCAOTE).
    """

    output: Literal["weighted", "mean"] = "weighted"

    def scores(self, layer: Layer) -> Tensor:
        """Output change of removing each position alone.

        Raises:
            ProbeError: the base's scores are not weights.
        """
        base = self.base.scores(layer)
        if bool((base < 0).any()):
            raise ProbeError(
                f"caote needs scores that are weights; `{self.base.name}` gives negative ones",
                fix="wrap a method that scores by attention, such as snapkv, h2o or tova",
            )
        v_GLD = layer.require("v_LGD").to(base.dtype).movedim(-3, -2)
        a = base / base.sum(-1, keepdim=True)
        o = (a[..., None] * v_GLD).sum(-2, keepdim=True) if self.output == "weighted" else v_GLD.mean(-2, keepdim=True)
        # With all weight on one position the quotient has no bound; the largest finite one ranks the same.
        rest = (1 - a).clamp(min=torch.finfo(a.dtype).eps)
        return a / rest * (o - v_GLD).norm(dim=-1)
