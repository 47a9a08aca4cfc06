"""ExpectedAttention: the attention that a Gaussian model of future queries would pay."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from sglang_probe.attention.rope import Rotary
from sglang_probe.errors import ProbeError
from sglang_probe.eviction.base import Method
from sglang_probe.eviction.layer import Layer
from sglang_probe.eviction.registry import register
from sglang_probe.eviction.scoring import GroupReduction, reduce_group, value_norms


@register("expected_attention", source="arXiv 2510.00636")
class ExpectedAttention(Method):
    """Mean and covariance of the pre-RoPE prompt queries, turned by the mean rotation over future positions.

    Score: softmax over the keys after the sinks of `k·Rμ s + ½ kᵀ R Σ Rᵀ k s²` (s the attention scale), reduced over
    the group, plus `epsilon`, times the norm of the value. Sinks enter neither the statistics nor the softmax.
    """

    sinks: int = Field(default=4, ge=0)
    future_positions: int = Field(default=512, ge=1)
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = Field(default=0.0, ge=0)
    gqa: GroupReduction = "mean"

    def scores(self, layer: Layer) -> Tensor:
        """Expected attention after the sinks; a sink has score 0 and is always kept."""
        if layer.spec.softcap is not None:
            raise ProbeError(
                "expected_attention has no closed form under a soft cap", fix="leave it out for this model"
            )
        rotary: Rotary = layer.require("rotary")
        q_HLD = layer.pre_rope_queries()[..., self.sinks :, :, :].movedim(-3, -2)
        dtype = torch.promote_types(q_HLD.dtype, torch.float32)
        q_HLD = torch.unflatten(q_HLD.to(dtype), -3, (layer.kv_heads, layer.group))
        mean_GRD = q_HLD.mean(-2)
        centred = q_HLD - mean_GRD[..., None, :]
        cos, sin = rotary.tables(torch.arange(layer.length, layer.length + self.future_positions))
        cos, sin = cos.mean(0), sin.mean(0)
        k_GDL = layer.k_LGD[..., self.sinks :, :, :].to(dtype).movedim(-3, -1)
        logits = (rotary.turn(mean_GRD, cos, sin) @ k_GDL) * layer.spec.scaling
        if self.covariance:
            # Two turns of the last axis with a transpose between: Σ, then Σ Rᵀ, then R Σ Rᵀ.
            spread = rotary.turn(centred.mT @ centred / centred.shape[-2], cos, sin)
            spread = rotary.turn(spread.mT, cos, sin)
            k = k_GDL[..., None, :, :]
            logits = logits + 0.5 * (k * (spread @ k)).sum(-2) * layer.spec.scaling**2
        scores = reduce_group(torch.softmax(logits, -1), self.gqa)
        if self.value_norm:
            norms = value_norms(layer, projected=False)[..., 0, self.sinks :]
            scores = (scores + self.epsilon) * norms
        return torch.cat([scores.new_zeros(*scores.shape[:-1], min(self.sinks, layer.length)), scores], -1)
